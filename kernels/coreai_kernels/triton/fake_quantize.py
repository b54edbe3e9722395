"""``fake_quantize_forward`` and ``fake_quantize_backward``: one read, one write and one bit an element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.triton import tiles
from coreai_kernels.triton.elementwise import INTERPRETED, fp32, narrow
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
    """Gradients in groups of 8, times the bits of the groups' bytes.

    A product, not a selection: the reference lets NaN and infinity through. In a narrow dtype it is exact,
    and one instruction for two. In float32, what LLVM makes of 32 selections costs more than products.
    """
    lane = tl.arange(0, 8)
    bit = bits[:, None] & (1 << lane)[None, :]
    if g.dtype.primitive_bitwidth == 16 and not INTERPRETED:
        product = g * tl.where(bit != 0, 1.0, 0.0).to(g.dtype)
    else:
        one = (bit * (0x3F800000 >> lane)[None, :]).to(tl.float32, bitcast=True)
        product = narrow(fp32(g) * one, g.dtype)
    return product


@triton.jit(do_not_specialize=["numel"])
def _backward(grad, mask, output, numel, UNIT: tl.constexpr, TILE: tl.constexpr, IN_PLACE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    group = tl.arange(0, TILE // 8)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(numel.to(tl.int64) * UNIT - start, TILE).to(tl.int32)
    valid_group = group * 8 < left
    if UNIT == TILE:
        valid_group = None
    bits = tiles.load_valid(mask + start // 8 + group, valid_group, 0).to(tl.int32)
    if UNIT == TILE:
        valid = None
    elif UNIT == 8:
        valid = tl.broadcast_to(valid_group[:, None], (TILE // 8, 8))
    else:
        valid = element < left
    if IN_PLACE:  # what passes is not even read
        changes = tl.broadcast_to(bits[:, None] != 255, (TILE // 8, 8))
        valid = changes if valid is None else valid & changes
    g = tiles.load_valid(grad + start + element, valid)
    tl.store(output + start + element, masked(g, bits), mask=valid)


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
    tile = tiles.tile_elements(numel, source.element_size())
    unit = tiles.unit_of(numel, tile)
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
        warps=2 if tile >= 2048 else 4,
    )


def _strides(x: Tensor, order: list[int]) -> list[int]:
    strides, step = [0] * x.dim(), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(x.size(axis), 1)
    return strides
