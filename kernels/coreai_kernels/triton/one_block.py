"""The second launch of a step on a tensor that is one large block."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.formats import ScaleFormat
from coreai_kernels.triton import tiles
from coreai_kernels.triton.elementwise import (
    CORRECTED,
    EXACT,
    block_range,
    fake_quantize_by_division,
    fake_quantize_by_product,
    for_products,
    fp32,
    is_finite,
    suits_products,
)
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import power_of_two
from coreai_kernels.triton.observe_range import Partials
from coreai_kernels.triton.qparams import Constants, finish, tl_dtype

__all__ = ["quantize_one_block"]

# Elements from which a program, once it has finished the reduction, does several tiles.
_REPEAT_FROM = 1 << 22
_E8M0 = tl.constexpr(int(ScaleFormat.E8M0))


@triton.jit(do_not_specialize=["numel", "parts"], do_not_specialize_on_alignment=["mask"])
def _one_block(
    input,
    output,
    mask,
    partial_low,
    partial_high,
    numel,
    parts,
    state,
    numbers,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    REPEAT: tl.constexpr,
):
    # The reduction read the tensor from its start: its end is what a cache still holds.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.arange(0, PARTS)
    low = tl.load(partial_low + part, mask=part < parts, other=float("inf"))
    high = tl.load(partial_high + part, mask=part < parts, other=float("-inf"))
    low, high = block_range(low[None, :], high[None, :], 1)
    finite = tl.sum(is_finite(low, high).to(tl.int32), 0) != 0
    index = tl.arange(0, 1)
    owned = (index == 0) & (program == 0)
    scale, zero_point, minval = finish(low, high, index, None, owned, state, numbers, CONFIG, DTYPE)
    # One value each: as tensors of one element they would go through shared memory in every tile.
    s = tl.sum(scale, 0)
    zp = 0.0
    off = 0.0
    if CONFIG.format == 0 and CONFIG.use_minval:
        zp = numbers[0]
        off = tl.sum(minval, 0)
    elif CONFIG.format == 0:
        zp = tl.sum(zero_point.to(tl.float32), 0)
    EXACT_SCALES: tl.constexpr = CONFIG.scale_format == _E8M0
    suits = CONFIG.short_bounds
    if CONFIG.short_bounds and not EXACT_SCALES:
        ZERO_POINT: tl.constexpr = CONFIG.format == 0 and not CONFIG.use_minval
        suits = finite & suits_products(s, zp, numbers[0], numbers[1], ZERO_POINT)
    if suits:
        PRODUCT: tl.constexpr = EXACT if EXACT_SCALES else CORRECTED
        unit, reciprocal, bottom, top = for_products(s, zp, numbers[0], numbers[1], CONFIG.format, PRODUCT)
        for step in range(REPEAT):
            start = (program.to(tl.int64) * REPEAT + (REPEAT - 1 - step)) * TILE
            _tile(
                input,
                output,
                mask,
                numel,
                start,
                unit,
                zp,
                reciprocal,
                off,
                bottom,
                top,
                CONFIG,
                PRODUCT,
                UNIT,
                TILE,
            )
    else:
        for step in range(REPEAT):
            start = (program.to(tl.int64) * REPEAT + (REPEAT - 1 - step)) * TILE
            _tile(
                input,
                output,
                mask,
                numel,
                start,
                s,
                zp,
                0.0,
                off,
                numbers[0],
                numbers[1],
                CONFIG,
                0,
                UNIT,
                TILE,
            )


@triton.jit
def _tile(
    input,
    output,
    mask,
    numel,
    start,
    by,
    zp,
    reciprocal,
    off,
    low,
    high,
    CONFIG: tl.constexpr,
    PRODUCT: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    group = tl.arange(0, TILE // 8)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(numel.to(tl.int64) * UNIT - start, TILE).to(tl.int32)
    valid_group = group * 8 < left
    if UNIT == TILE:
        valid_group = None
        valid = None
    elif UNIT == 8:
        valid = tl.broadcast_to(valid_group[:, None], (TILE // 8, 8))
    else:
        valid = element < left
    x = fp32(tiles.load_valid(input + start + element, valid))
    if PRODUCT != 0:
        OFFSET: tl.constexpr = CONFIG.format == 0 and CONFIG.use_minval
        y, inside = fake_quantize_by_product(
            x, by, reciprocal, off, low, high, CONFIG.format, OFFSET, PRODUCT, True
        )
    else:
        y, inside = fake_quantize_by_division(x, by, zp, off, low, high, CONFIG.format)
    bits = mask
    if mask is not None:
        bits = mask + start // 8
    tiles.store_tile(y, inside, output + start, element, valid, bits, group, valid_group, UNIT != 1)


def quantize_one_block(
    source: Tensor,
    output: Tensor,
    mask: Tensor | None,
    partials: Partials,
    state: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: Constants,
) -> None:
    """Finish the reduction of a dense tensor that is one block, and fake-quantize it.

    Args:
        source: the tensor.
        output: receives the result; may be ``source``.
        mask: receives the packed mask, if given.
        partials: what :func:`coreai_kernels.triton.observe_range.reduce_blocks` left.
        state: as :func:`coreai_kernels.triton.qparams.finish` has it; the old range must not be the new one.
        numbers: likewise.
        constants: likewise.
    """
    numel = source.numel()
    tile = tiles.tile_elements(numel, source.element_size())
    # Finishing the reduction costs a program about as much as a tile.
    repeat = 4 if numel >= _REPEAT_FROM else 1
    # 32 elements a thread: with 64 of 2 bytes some loops run out of registers.
    warps = 2 if tile == 2048 else 4
    unit = tiles.unit_of(numel, tile) if numel % (tile * repeat) == 0 else tiles.unit_of(numel)
    launch(
        _one_block,
        triton.cdiv(numel, tile * repeat),
        source,
        source,
        output,
        mask,
        partials.low,
        partials.high,
        numel // unit,
        partials.parts,
        state,
        numbers,
        CONFIG=constants,
        DTYPE=tl_dtype(source.dtype),
        PARTS=power_of_two(partials.parts),
        UNIT=unit,
        TILE=tile,
        REPEAT=repeat,
        warps=warps,
    )
