"""``lookup``: weights from a palette, with gradients to the palette and straight through to a weight."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import lookup as reference
from coreai_kernels.triton import registry as triton

__all__ = ["lookup", "lookup_packed"]


def _weight_shape(indices: Tensor, dim: int) -> tuple[int, ...]:
    return (indices.size(0) * dim, *indices.shape[1:]) if indices.dim() else ()


def _fake(indices: Tensor, centroids: Tensor, block_size: list[int], mask: Tensor | None = None) -> Tensor:
    dim = centroids.size(2)
    if dim == 1:
        return torch.empty_like(indices, dtype=centroids.dtype)
    return centroids.new_empty(_weight_shape(indices, dim))


def _fake_backward(
    grad: Tensor, indices: Tensor, block_size: list[int], num_clusters: int, dim: int
) -> Tensor:
    blocks = grad.numel() // max(1, torch.Size(block_size).numel())
    return grad.new_empty((blocks, num_clusters, dim), dtype=torch.float32)


define(
    "lookup",
    "(Tensor indices, Tensor centroids, int[] block_size, Tensor? mask=None) -> Tensor",
    reference=reference.lookup,
    fake=_fake,
    triton=triton.get("lookup"),
)
define(
    "lookup_packed",
    "(Tensor packed, Tensor centroids, int[] shape, int[] block_size, int bits) -> Tensor",
    reference=reference.lookup_packed,
    fake=lambda packed, centroids, shape, block_size, bits: centroids.new_empty(shape),
    triton=triton.get("lookup_packed"),
)
define(
    "lookup_backward",
    "(Tensor grad, Tensor indices, int[] block_size, int num_clusters, int dim) -> Tensor",
    reference=reference.lookup_backward,
    fake=_fake_backward,
    triton=triton.get("lookup_backward"),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, centroids, block_size, mask = inputs
    ctx.save_for_backward(indices, mask)
    ctx.block_size, ctx.palette, ctx.dtype = block_size, centroids.shape, centroids.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[1]:
        return None, None, None, None
    indices, mask = ctx.saved_tensors
    _, clusters, dim = ctx.palette
    grad = grad if mask is None else grad * mask
    sums = implementation("lookup_backward")(grad, indices, ctx.block_size, clusters, dim)
    return None, sums.to(ctx.dtype), None, None


torch.library.register_autograd("coreai_kernels::lookup", _backward, setup_context=_setup_context)


class _Lookup(torch.autograd.Function):
    """Eager mode's gradient, around the backend in use."""

    @staticmethod
    def forward(
        ctx: Any,
        indices: Tensor,
        centroids: Tensor,
        block_size: tuple[int, ...],
        mask: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        """The weights looked up."""
        output: Tensor = implementation("lookup")(indices, centroids, block_size, mask)
        _setup_context(ctx, (indices, centroids, block_size, mask), output)
        ctx.weight_dtype = None if weight is None else weight.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """To the centroids, and to the weight, unchanged where nothing is masked."""
        to_weight = None
        if ctx.needs_input_grad[4]:
            mask = ctx.saved_tensors[1]
            to_weight = (grad if mask is None else grad * mask).to(ctx.weight_dtype)
        return *_backward(ctx, grad), to_weight


class _StraightThrough(torch.autograd.Function):
    """The first argument's value with a gradient to both."""

    @staticmethod
    def forward(ctx: Any, looked_up: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        """``looked_up``, unchanged."""
        ctx.dtype = weight.dtype
        ctx.save_for_backward(mask)
        return looked_up.view_as(looked_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """The gradient, and what of it is not masked."""
        (mask,) = ctx.saved_tensors
        return grad, (grad if mask is None else grad * mask).to(ctx.dtype), None


def lookup(
    indices: Tensor,
    centroids: Tensor,
    *,
    block_size: tuple[int, ...],
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Weights that indices into a palette stand for.

    The gradient to the centroids is the sum over the weights that use them: float64 sums in a fixed order on
    the CPU, so the same on every run and for every number of threads; on a GPU float32 within tiles or parts
    (1e-5 of the sum of magnitudes), equally reproducible.

    Args:
        indices: uint8, each below the number of centroids. What others yield is not defined, but no memory
            beyond the palette is read.
        centroids: ``(blocks, k, dim)``, floating point, at most 256 a block; a vector is ``dim`` consecutive
            entries of axis 0 of the weight.
        block_size: extent of a block *of the weight* along each axis.
        weight: the weight that was palettized; the gradient passes to it unchanged (straight-through
            estimator, Bengio et al., arXiv 1308.3432).
        mask: for scalars, bool of the shape of ``indices``: where it is False the result is zero, with the
            sign of what was looked up, and gradients are zero.

    Returns:
        Tensor of the dtype of ``centroids``; its first axis is ``dim`` times that of ``indices``. For scalars
        in the memory format of ``indices``, for vectors contiguous.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``indices`` is not uint8, ``mask`` not bool, or ``centroids`` not floating point.
    """
    if indices.dtype != torch.uint8:
        raise TypeError(f"indices must be uint8; got {indices.dtype}")
    dim = centroids.size(-1) if centroids.dim() else 1
    shape = _weight_shape(indices, dim)
    checks.check_centroids(centroids, shape, block_size)
    if weight is not None and weight.shape != torch.Size(shape):
        raise ValueError(f"weight must have the shape looked up, {shape}; got {tuple(weight.shape)}")
    if mask is not None:
        _check_mask(mask, indices, dim)
    if torch.compiler.is_compiling():
        found = implementation("lookup")(indices, centroids, block_size, mask)
        return found if weight is None else _StraightThrough.apply(found, weight, mask)  # type: ignore[no-any-return]
    needs_grad = centroids.requires_grad or (weight is not None and weight.requires_grad)
    if not (needs_grad and torch.is_grad_enabled()):
        centroids = centroids.detach()
        return implementation("lookup")(indices, centroids, block_size, mask)  # type: ignore[no-any-return]
    return _Lookup.apply(indices, centroids, block_size, mask, weight)  # type: ignore[no-any-return]


def _check_mask(mask: Tensor, indices: Tensor, dim: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; got {mask.dtype}")
    if dim > 1:
        raise ValueError(f"mask is for scalars; got centroids of {dim} entries")
    if mask.shape != indices.shape or mask.device != indices.device:
        raise ValueError(
            f"mask must have the shape and device of indices, {tuple(indices.shape)} on {indices.device}; "
            f"got {tuple(mask.shape)} on {mask.device}"
        )


def lookup_packed(
    packed: Tensor, centroids: Tensor, shape: tuple[int, ...], *, block_size: tuple[int, ...], bits: int
) -> Tensor:
    """:func:`lookup` of indices as :func:`coreai_kernels.pack_bits` stores them. No gradient.

    Args:
        packed: 1-D uint8, ``bits`` bits an index, indices in row-major order.
        centroids: ``(blocks, k, dim)``, floating point.
        shape: shape of the weight.
        block_size: extent of a block of the weight along each axis.
        bits: 1 to 8.

    Returns:
        Contiguous tensor of ``shape`` and the dtype of ``centroids``.

    Raises:
        ValueError: shapes, number of bytes or ``bits`` do not fit.
        TypeError: ``packed`` is not uint8, or ``centroids`` is not floating point.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8; got {bits}")
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed must be uint8; got {packed.dtype}")
    checks.check_centroids(centroids, tuple(shape), block_size)
    count = torch.Size(shape).numel() // centroids.size(2)
    if packed.dim() != 1 or packed.numel() != (count * bits + 7) // 8:
        raise ValueError(
            f"packed must be 1-D with {(count * bits + 7) // 8} bytes for {count} indices of {bits} bits; "
            f"got shape {tuple(packed.shape)}"
        )
    return implementation("lookup_packed")(  # type: ignore[no-any-return]
        packed, centroids.detach(), shape, block_size, bits
    )
