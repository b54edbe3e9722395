"""``fake_quantize_forward`` and ``fake_quantize_backward``: one read, one write and one bit an element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.triton import tiles
from coreai_kernels.triton.elementwise import fp32, narrow
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import dense, geometry_of

__all__ = [
    "empty_mask",
    "fake_quantize_backward",
    "fake_quantize_backward_",
    "fake_quantize_forward",
    "leaves_what_passes",
    "masked",
]


@triton.jit
def masked(g, bits):
    """Float32 gradients in groups of 8, times the bits of the groups' bytes.

    A product, not a selection: the reference lets NaN and infinity through.
    """
    bit = 1 << tl.arange(0, 8)
    return g * tl.where((bits[:, None] & bit[None, :]) != 0, 1.0, 0.0)


@triton.jit(do_not_specialize=["numel"])
def _backward(grad, mask, output, numel, UNIT: tl.constexpr, TILE: tl.constexpr, IN_PLACE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    group = tl.arange(0, TILE // 8)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(numel.to(tl.int64) * UNIT - start, TILE).to(tl.int32)
    valid_group = group * 8 < left
    bits = tl.load(mask + start // 8 + group, mask=valid_group, other=0).to(tl.int32)
    if IN_PLACE:  # what passes is not even read
        valid_group = valid_group & (bits != 255)
    valid = tl.broadcast_to(valid_group[:, None], (TILE // 8, 8))
    if UNIT != 8:
        valid = valid & (element < left)
    g = fp32(tl.load(grad + start + element, mask=valid, other=0.0))
    tl.store(output + start + element, narrow(masked(g, bits), output.dtype.element_ty), mask=valid)


def empty_mask(numel: int, with_mask: bool, like: Tensor) -> Tensor:
    """Uninitialised packed mask: one bit an element, or nothing."""
    return torch.empty((numel + 7) // 8 if with_mask else 0, dtype=torch.uint8, device=like.device)


def fake_quantize_forward(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: list[int],
    format: int,
    quant_min: float,
    quant_max: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference/fake_quantize.py``. A strided input is copied once, and quantized in place."""
    source = dense(input)
    output = torch.empty_like(input) if source is input else source
    mask = empty_mask(source.numel(), with_mask, source)
    tiles.run(
        tiles.FAKE_QUANTIZE,
        geometry_of(source, block_size),
        source,
        output,
        mask if with_mask else None,
        scale,
        zero_point,
        minval,
        format,
        quant_min,
        quant_max,
    )
    return output, mask


def fake_quantize_backward(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """See ``reference/fake_quantize.py``. ``order`` empty means row-major."""
    axes = list(order) or list(range(grad.dim()))
    output = torch.empty_strided(grad.shape, _strides(grad, axes), dtype=grad.dtype, device=grad.device)
    source = grad if grad.permute(axes).is_contiguous() else output.copy_(grad)
    if grad.numel():
        _launch_backward(source, mask, output)
    return output


def fake_quantize_backward_(grad: Tensor, mask: Tensor, order: list[int]) -> None:
    """The same in place, of a gradient that lies in memory as ``order`` says."""
    if not grad.permute(list(order) or list(range(grad.dim()))).is_contiguous():
        raise ValueError(f"grad must lie in memory in the order {order}; its strides are {grad.stride()}")
    if grad.numel():
        _launch_backward(grad, mask, grad)


def leaves_what_passes(source: Tensor, output: Tensor) -> bool:
    """Whether gradients that pass are in their place already. Those in float64 are rounded to float32."""
    return source is output and source.dtype != torch.float64


def _launch_backward(source: Tensor, mask: Tensor, output: Tensor) -> None:
    numel = source.numel()
    tile, unit = tiles.tile_elements(numel, source.element_size()), tiles.unit_of(numel)
    launch(
        _backward,
        triton.cdiv(numel, tile),
        source,
        source,
        mask,
        output,
        numel // unit,
        UNIT=unit,
        TILE=tile,
        IN_PLACE=leaves_what_passes(source, output),
        warps=4,
    )


def _strides(x: Tensor, order: list[int]) -> list[int]:
    strides, step = [0] * x.dim(), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(x.size(axis), 1)
    return strides
