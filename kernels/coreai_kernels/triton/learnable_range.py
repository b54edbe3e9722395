"""``learnable_range_backward``: one read of gradient and input, one write; sums without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.reference import learnable_range as reference
from coreai_kernels.reference.layout import memory_order
from coreai_kernels.triton.elementwise import fp32, narrow, round_half_even
from coreai_kernels.triton.launch import launch, multiprocessors
from coreai_kernels.triton.layout import dense, geometry_of

__all__ = ["learnable_range_backward"]

_TILE = 1024


@triton.jit(do_not_specialize=["size", "run", "width", "slab", "pieces", "length"])
def _backward(
    grad, input, low, range_, output, sums, level_low, level_high, size, run, width, slab, per_slab, pieces,
    length, HAS_LOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # A block's elements are runs of `run` neighbours, `width` apart; a slab holds `per_slab` blocks.
    program = tl.program_id(0).to(tl.int64)
    block, piece = program // pieces, program % pieces
    first = (block // per_slab) * slab + (block % per_slab) * run
    span = tl.load(range_ + block)
    step = tl.math.div_rn(span, level_high)
    offset = tl.load(low + block) if HAS_LOW else 0.0
    ratio = tl.math.div_rn(level_low, level_high)
    sum_low, sum_range = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        index = piece * length + start + tl.arange(0, TILE)
        valid = (start + tl.arange(0, TILE) < length) & (index < size)
        at = first + (index // run) * width + index % run
        x = fp32(tl.load(input + at, mask=valid, other=0.0))
        g = fp32(tl.load(grad + at, mask=valid, other=0.0))
        q = round_half_even(tl.math.div_rn(x - offset, step))
        clamped = tl.where(q > level_low, q, level_low)
        clamped = tl.where(clamped < level_high, clamped, level_high)
        inside = clamped == q
        y = clamped * step + offset
        slope = tl.where(inside, tl.math.div_rn(y - x, span), tl.where(clamped == level_high, 1.0, ratio))
        tl.store(output + at, narrow(g * inside.to(tl.float32), output.dtype.element_ty), mask=valid)
        sum_range += tl.where(valid, g * slope, 0.0)
        sum_low += tl.where(valid & (inside == 0), g, 0.0)
    tl.store(sums + 2 * program, tl.sum(sum_low, 0))
    tl.store(sums + 2 * program + 1, tl.sum(sum_range, 0))


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
        TILE=_TILE,
        warps=4,
    )
    total = sums.double().sum(1).float()
    shape = [range.shape[axis] for axis in order]
    back = [order.index(axis) for axis in sorted(order)]
    to_low, to_range = (total[:, i].reshape(shape).permute(back).contiguous() for i in (0, 1))
    return output, torch.zeros_like(range) if low is None else to_low, to_range
