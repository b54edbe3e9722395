"""``soft_palettize`` and ``soft_centroids``: differentiable k-means."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import soft_palettize as reference
from coreai_kernels.triton import registry as triton

__all__ = ["soft_centroids", "soft_palettize"]

_ARGUMENTS = "Tensor weight, Tensor centroids, float temperature, int[] block_size"


def _fake_moved(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: list[int]
) -> tuple[Tensor, Tensor]:
    moved = centroids.new_empty(centroids.shape, dtype=torch.float32)
    return moved, moved.new_empty(centroids.shape[:2])


def _fake_gradients(weight: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), centroids.new_empty(centroids.shape, dtype=torch.float32)


define(
    "soft_palettize",
    f"({_ARGUMENTS}) -> Tensor",
    reference=reference.soft_palettize_forward,
    fake=lambda weight, *_: torch.empty_like(weight),
    triton=triton.get("soft_palettize"),
)
define(
    "soft_palettize_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=reference.soft_palettize_backward,
    fake=lambda grad, weight, centroids, *_: _fake_gradients(weight, centroids),
    triton=triton.get("soft_palettize_backward"),
)
define(
    "soft_centroids",
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=reference.soft_centroids_forward,
    fake=_fake_moved,
    triton=triton.get("soft_centroids"),
)
define(
    "soft_centroids_backward",
    f"(Tensor grad, Tensor moved, Tensor mass, {_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=reference.soft_centroids_backward,
    fake=lambda grad, moved, mass, weight, centroids, *_: _fake_gradients(weight, centroids),
    triton=triton.get("soft_centroids_backward"),
)


def _setup_palettize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, centroids, *ctx.arguments = inputs
    ctx.save_for_backward(weight, centroids)


def _palettize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, centroids = ctx.saved_tensors
    to_weight, to_centroids = implementation("soft_palettize_backward")(
        grad, weight, centroids, *ctx.arguments
    )
    return to_weight, to_centroids.to(centroids.dtype), None, None


def _setup_centroids(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, centroids, *ctx.arguments = inputs
    ctx.save_for_backward(weight, centroids, *output)
    ctx.mark_non_differentiable(output[1])


def _centroids_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    weight, centroids, moved, mass = ctx.saved_tensors
    to_weight, to_centroids = implementation("soft_centroids_backward")(
        grad, moved, mass, weight, centroids, *ctx.arguments
    )
    return to_weight, to_centroids.to(centroids.dtype), None, None


torch.library.register_autograd(
    "coreai_kernels::soft_palettize", _palettize_backward, setup_context=_setup_palettize
)
torch.library.register_autograd(
    "coreai_kernels::soft_centroids", _centroids_backward, setup_context=_setup_centroids
)


class _SoftPalettize(torch.autograd.Function):
    """Eager mode's gradient, around the backend in use."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Attention-weighted centroids."""
        output: Tensor = implementation("soft_palettize")(*inputs)
        _setup_palettize(ctx, inputs, output)
        return output

    backward = staticmethod(_palettize_backward)  # type: ignore[assignment]


class _SoftCentroids(torch.autograd.Function):
    """Eager mode's gradient, around the backend in use."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """The next centroids, and their mass."""
        output: tuple[Tensor, Tensor] = implementation("soft_centroids")(*inputs)
        _setup_centroids(ctx, inputs, output)
        return output

    backward = staticmethod(_centroids_backward)  # type: ignore[assignment]


def _check(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...], iterations: int
) -> None:
    checks.check_float_input("weight", weight)
    checks.check_centroids(centroids, weight.shape, block_size)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0; got {iterations}")


def _moved(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...], iterations: int
) -> Tensor:
    compiling = torch.compiler.is_compiling()
    for _ in range(iterations):
        step = implementation("soft_centroids") if compiling else _SoftCentroids.apply
        centroids = step(weight, centroids, temperature, block_size)[0]
    return centroids


def soft_centroids(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    *,
    block_size: tuple[int, ...],
    iterations: int = 1,
) -> Tensor:
    """Centroids after some steps of differentiable k-means (Cho et al., DKM, arXiv 2108.12659).

    A step, with weights ``w_i`` and centroids ``c_j``::

        a_ij = softmax over j of -|w_i - c_j|^2 / temperature      c_j = sum_i a_ij w_i / sum_i a_ij

    A centroid that attracts no weight (a sum of attention below 2^-100) stays. The attention is never stored:
    the backward pass computes it again, so each step keeps no more than its centroids.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor; the latter is rounded to float32.
        centroids: ``(blocks, k, dim)``, at most 256 a block; a vector is ``dim`` consecutive entries of
            axis 0.
        temperature: above 0, in the unit of squared weights. Small ones approach hard assignment.
        block_size: extent of a block of ``weight`` along each axis; ``dim`` must divide the first.
        iterations: number of steps; with 0 the centroids are returned as they are.

    Returns:
        float32 tensor of the shape of ``centroids``, with gradients to ``weight`` and ``centroids``. Backends
        agree to 1e-5 of the palette's spread (exponentials differ in the last bit); each is deterministic.

    Raises:
        ValueError: shapes, ``temperature`` or ``iterations`` do not fit.
        TypeError: ``weight`` or ``centroids`` is not floating point.
    """
    _check(weight, centroids, temperature, block_size, iterations)
    return _moved(weight, centroids, temperature, block_size, iterations)


def soft_palettize(
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    *,
    block_size: tuple[int, ...],
    iterations: int = 0,
) -> Tensor:
    """Attention-weighted centroids: a palettized weight that is differentiable in weight and palette.

    ``iterations`` steps of :func:`soft_centroids`, and then ``out_i = sum_j a_ij c_j`` with the attention
    ``a`` of the last centroids. Nothing of the size weights times clusters is ever stored.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor; the latter is rounded to float32.
        centroids: ``(blocks, k, dim)``, at most 256 a block; a vector is ``dim`` consecutive entries of
            axis 0.
        temperature: above 0, in the unit of squared weights. Small ones approach hard assignment.
        block_size: extent of a block of ``weight`` along each axis; ``dim`` must divide the first.
        iterations: number of steps that move the centroids first.

    Returns:
        Tensor of the shape, dtype and memory format of ``weight``. Backends agree to 1e-5 of the palette's
        spread; each is deterministic.

    Raises:
        ValueError: shapes, ``temperature`` or ``iterations`` do not fit.
        TypeError: ``weight`` or ``centroids`` is not floating point.
    """
    _check(weight, centroids, temperature, block_size, iterations)
    centroids = _moved(weight, centroids, temperature, block_size, iterations)
    if torch.compiler.is_compiling():
        return implementation("soft_palettize")(  # type: ignore[no-any-return]
            weight, centroids, temperature, block_size
        )
    return _SoftPalettize.apply(weight, centroids, temperature, block_size)  # type: ignore[no-any-return]
