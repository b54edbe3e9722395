"""``learnable_range_backward``: one read of gradient and input, one write; sums without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.reference import learnable_range as reference
from coreai_kernels.reference.layout import memory_order
from coreai_kernels.triton.elementwise import (
    CORRECTED,
    fake_quantize_by_product,
    for_products,
    fp32,
    has_short_bounds,
    narrow,
    round_half_even,
    suits_products,
)
from coreai_kernels.triton.launch import launch, multiprocessors
from coreai_kernels.triton.layout import StridedReduction, dense, geometry_of
from coreai_kernels.wide import widened

__all__ = ["learnable_range_backward"]

_TILE = 1024


# Where the elements of a block lie: in one run, one by one, or in several runs.
_ONE_RUN, _SINGLES, _RUNS = (tl.constexpr(i) for i in range(3))
# Elements that a thread reads together.
_PACK = tl.constexpr(8)


@triton.jit
def _sweep(
    grad, input, output, first, piece_start, count, span, step, offset, level_low, level_high, run, width,
    HAS_LOW: tl.constexpr, PRODUCTS: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One piece of a block: its gradients, and for each lane the sums of those to the range's ends."""
    ratio = tl.math.div_rn(level_low, level_high)
    unit, reciprocal, lowest, highest = for_products(step, 0.0, level_low, level_high, 0, CORRECTED)
    inverse = tl.math.div_rn(1.0, span)
    top = level_high * step
    sum_low, sum_range = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        valid = index < count
        if PLACES == _ONE_RUN:
            at = first + piece_start + index
        elif PLACES == _SINGLES:
            at = first + (piece_start + index) * width
        else:
            at = first + ((piece_start + index) // run) * width + (piece_start + index) % run
        x = fp32(tl.load(input + at, mask=valid, other=0.0))
        g = fp32(tl.load(grad + at, mask=valid, other=0.0))
        if PRODUCTS:
            y, inside = fake_quantize_by_product(
                x, unit, reciprocal, offset, lowest, highest, 0, HAS_LOW, CORRECTED, False
            )
            passes = inside
            inside = inside != 0.0
            # The sum's order is free, and so is an error of its size.
            slope = tl.where(inside, (y - x) * inverse, tl.where(x - offset > top, 1.0, ratio))
        else:
            q = round_half_even(tl.math.div_rn(x - offset, step))
            clamped = tl.where(q > level_low, q, level_low)
            clamped = tl.where(clamped < level_high, clamped, level_high)
            inside = clamped == q
            passes = inside.to(tl.float32)
            y = clamped * step + offset
            slope = tl.where(inside, tl.math.div_rn(y - x, span), tl.where(clamped == level_high, 1.0, ratio))
            slope = tl.where(valid, slope, 0.0)  # an infinite range makes NaN of zeros
        tl.store(output + at, narrow(g * passes, output.dtype.element_ty), mask=valid)
        # What lies beyond the piece has no gradient.
        sum_range += g * slope
        if HAS_LOW:
            sum_low += tl.where(inside, 0.0, g)
    return sum_low, sum_range


# `per_slab` is among them because 1 would be folded away, and with it what is said of `first`.
@triton.jit(do_not_specialize=["size", "run", "width", "slab", "per_slab", "pieces", "length"])
def _backward(
    grad, input, low, range_, output, sums, level_low, level_high, size, run, width, slab, per_slab, pieces,
    length, HAS_LOW: tl.constexpr, PRODUCTS: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    # A block's elements are runs of `run` neighbours, `width` apart; a slab holds `per_slab` blocks.
    program = tl.program_id(0).to(tl.int64)
    block, piece = program // pieces, program % pieces
    first = (block // per_slab) * slab + (block % per_slab) * run
    piece_start = piece * length
    count = tl.minimum(size - piece_start, length).to(tl.int32)
    if ALIGNED:
        first = tl.multiple_of(first, _PACK)
        piece_start = tl.multiple_of(piece_start, _PACK)
        count = tl.multiple_of(count, _PACK)
    span = tl.load(range_ + block)
    step = tl.math.div_rn(span, level_high)
    offset = tl.load(low + block) if HAS_LOW else 0.0
    sum_low, sum_range = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    if PRODUCTS and suits_products(step, 0.0, level_low, level_high, False):
        sum_low, sum_range = _sweep(
            grad, input, output, first, piece_start, count, span, step, offset, level_low, level_high, run,
            width, HAS_LOW, True, PLACES, TILE,
        )  # fmt: skip
    else:
        sum_low, sum_range = _sweep(
            grad, input, output, first, piece_start, count, span, step, offset, level_low, level_high, run,
            width, HAS_LOW, False, PLACES, TILE,
        )  # fmt: skip
    tl.store(sums + 2 * program, tl.sum(sum_low, 0))
    tl.store(sums + 2 * program + 1, tl.sum(sum_range, 0))


def _places(strided: StridedReduction) -> int:
    if strided.depth == 1 or strided.blocks == 1:
        return int(_ONE_RUN.value)
    return int((_SINGLES if strided.run == 1 else _RUNS).value)


def learnable_range_backward(
    grad: Tensor,
    input: Tensor,
    low: Tensor | None,
    range: Tensor,
    block_size: list[int],
    level_low: float,
    level_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference/learnable_range.py``. Blocks that are no runs of neighbours take that way, too."""
    x = dense(input)
    geometry = geometry_of(x, block_size)
    strided = geometry.strided
    if strided is None or len(strided.outer) > 1 or not x.numel() or x.dtype == torch.float64:
        return reference.backward(grad, input, low, range, block_size, level_low, level_high)
    g = grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    size = strided.depth * strided.run
    wanted = max(1, 4 * multiprocessors(x) // geometry.blocks)
    length = triton.cdiv(triton.cdiv(size, min(wanted, triton.cdiv(size, _TILE))), _TILE) * _TILE
    pieces = triton.cdiv(size, length)
    order = memory_order(x)
    spans = range.permute(order).reshape(-1).contiguous()
    lows = spans if low is None else low.permute(order).reshape(-1).contiguous()
    output = torch.empty_like(x)
    sums = torch.empty(geometry.blocks, pieces, 2, dtype=torch.float32, device=x.device)
    launch(
        _backward,
        geometry.blocks * pieces,
        x,
        g,
        x,
        lows,
        spans,
        output,
        sums,
        float(level_low),
        float(level_high),
        size,
        strided.run,
        strided.width,
        strided.depth * strided.width,
        strided.blocks,
        pieces,
        length,
        HAS_LOW=low is not None,
        PRODUCTS=has_short_bounds(Format.INT, level_low, level_high),
        PLACES=_places(strided),
        ALIGNED=all(extent % _PACK.value == 0 for extent in (size, strided.run, strided.width)),
        TILE=_TILE,
        warps=4,
    )
    total = widened(sums).sum(1).float()
    shape = [range.shape[axis] for axis in order]
    back = [order.index(axis) for axis in sorted(order)]
    to_low, to_range = (total[:, i].reshape(shape).permute(back).contiguous() for i in (0, 1))
    return output, torch.zeros_like(range) if low is None else to_low, to_range
