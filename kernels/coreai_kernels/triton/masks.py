"""``nm_mask``, ``block_mask`` and ``apply_mask``. The selection of ``topk_mask`` is CUDA C++."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels import wide
from coreai_kernels.reference import block_mask as reference
from coreai_kernels.triton import tiles
from coreai_kernels.triton.elementwise import fp32, narrow
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import dense

__all__ = ["apply_mask", "block_mask", "nm_mask", "top_blocks"]

_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_key(x):
    """Integer that ranks as ``|x|`` does: see ``reference/magnitude.py``. All NaNs are one above infinity."""
    if x.dtype == tl.float64:
        key = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        key = tl.minimum(key, 0x7FF0000000000001)
    elif x.dtype == tl.float32:
        key = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    elif x.dtype == tl.bfloat16:
        key = tl.minimum(x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7F81)
    else:
        key = tl.minimum(x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7C01)
    return key


@triton.jit
def _rank(keys, PLACE: tl.constexpr, M: tl.constexpr):
    """How many of ``M`` elements rank before the one at ``PLACE``: of equals, those at lower places."""
    SIGN: tl.constexpr = keys[0].dtype.primitive_bitwidth - 1
    rank = tl.zeros_like(keys[0]) + (M - 1 - PLACE)
    for place in tl.static_range(M):  # keys are positive: differences do not overflow
        if place < PLACE:
            rank -= (keys[PLACE] - keys[place] - 1) >> SIGN
        elif place > PLACE:
            rank += (keys[place] - keys[PLACE] - 1) >> SIGN
    return rank


@triton.jit(do_not_specialize=["numel"])
def _neighbours(
    weight, mask, numel, N: tl.constexpr, M: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr
):
    # Groups of four or eight neighbours: a thread holds whole groups, and compares them without the others.
    start = tl.program_id(0).to(tl.int64) * TILE
    element = tl.arange(0, TILE)
    valid = None
    if UNIT != TILE:
        valid = element < numel.to(tl.int64) * UNIT - start
    key = magnitude_key(tiles.load_valid(weight + start + element, valid))
    if M == 4:
        even, odd = tl.split(tl.reshape(key, (TILE // 4, 2, 2)))
        k0, k2 = tl.split(even)
        k1, k3 = tl.split(odd)
        quad = (k0, k1, k2, k3)
        even = tl.join(_rank(quad, 0, 4), _rank(quad, 2, 4))
        odd = tl.join(_rank(quad, 1, 4), _rank(quad, 3, 4))
    else:
        even, odd = tl.split(tl.reshape(key, (TILE // 8, 2, 2, 2)))
        k04, k26 = tl.split(even)
        k15, k37 = tl.split(odd)
        k0, k4 = tl.split(k04)
        k1, k5 = tl.split(k15)
        k2, k6 = tl.split(k26)
        k3, k7 = tl.split(k37)
        keys = (k0, k1, k2, k3, k4, k5, k6, k7)
        r04 = tl.join(_rank(keys, 0, 8), _rank(keys, 4, 8))
        r15 = tl.join(_rank(keys, 1, 8), _rank(keys, 5, 8))
        r26 = tl.join(_rank(keys, 2, 8), _rank(keys, 6, 8))
        r37 = tl.join(_rank(keys, 3, 8), _rank(keys, 7, 8))
        even = tl.join(r04, r26)
        odd = tl.join(r15, r37)
    rank = tl.reshape(tl.join(even, odd), (TILE,))
    tl.store(mask + start + element, tl.where(rank < N, 1.0, 0.0).to(mask.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["groups", "inner"])
def _groups(
    weight, mask, groups, inner, N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr
):
    # Groups of any size, whose elements are ``inner`` apart.
    group = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    place = tl.arange(0, PADDED)
    inner = inner.to(tl.int64)
    element = (group // inner * M * inner + group % inner)[:, None] + place[None, :] * inner
    valid = (group < groups)[:, None] & (place < M)[None, :]
    key = magnitude_key(tl.load(weight + element, mask=valid, other=0.0))
    key = tl.where(valid, key, -1)
    other, own = key[:, None, :], key[:, :, None]
    lower = (place[None, :] < place[:, None])[None, :, :]
    rank = tl.sum(((other > own) | ((other == own) & lower)).to(tl.int32), 2)
    tl.store(mask + element, tl.where(rank < N, 1.0, 0.0).to(mask.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["channels", "outer", "inner"])
def _norms(
    weight,
    norms,
    channels,
    outer,
    inner,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Slices [:, channel, :] of outer x channels x inner elements: the largest magnitude, then the sum. A
    # program takes one slice, or if COLUMNS (inner is one) as many as are WIDTH.
    program = tl.program_id(0).to(tl.int64)
    stride = channels.to(tl.int64) * inner
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    if COLUMNS:
        base = program * WIDTH
        span = channels - base
        steps = span * 0 + 1
    else:
        base = program * inner
        span = inner.to(tl.int64)
        steps = span
    peaks = tl.zeros((ROWS, WIDTH), tl.int32)
    for first in range(0, outer, ROWS):
        for step in range(0, steps, WIDTH):
            element = base + (first + row).to(tl.int64)[:, None] * stride + (step + column)[None, :]
            valid = (first + row < outer)[:, None] & (step + column < span)[None, :]
            x = fp32(tl.load(weight + element, mask=valid, other=0.0))
            peaks = tl.maximum(peaks, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    peak = tl.max(peaks, 0)
    if not COLUMNS:
        peak = tl.zeros_like(peak) + tl.max(peak, 0)
    largest = tl.minimum(peak, _INFINITY - 1).to(tl.float32, bitcast=True).to(tl.float64)
    # Added to 2**52 units, a value has those bits and the number of its units. See the reference.
    exponent = tl.maximum(((largest.to(tl.int64, bitcast=True) >> 52) + 1) // 4 * 4 + 3 - 28, 1)
    unit = (exponent << 52).to(tl.float64, bitcast=True)
    offset = (exponent + 52) << 52
    shift = offset.to(tl.float64, bitcast=True)
    counts = tl.zeros((ROWS, WIDTH), tl.int64)
    for first in range(0, outer, ROWS):
        for step in range(0, steps, WIDTH):
            element = base + (first + row).to(tl.int64)[:, None] * stride + (step + column)[None, :]
            valid = (first + row < outer)[:, None] & (step + column < span)[None, :]
            x = fp32(tl.load(weight + element, mask=valid, other=0.0))
            shifted = tl.abs(x).to(tl.float64) + shift[None, :]
            counts += shifted.to(tl.int64, bitcast=True) - offset[None, :]
    count = tl.sum(counts, 0)
    if not COLUMNS:
        count = tl.zeros_like(count) + tl.sum(count, 0)
    norm = count.to(tl.float64) * unit
    norm = tl.where(peak == _INFINITY, float("inf"), norm)
    norm = tl.where(peak > _INFINITY, float("nan"), norm)
    if COLUMNS:
        tl.store(norms + base + column, norm, mask=column < span)
    else:
        tl.store(norms + program + column, norm, mask=column < 1)


@triton.jit(do_not_specialize=["numel"])
def _product(weight, mask, output, numel, UNIT: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    element = tl.arange(0, TILE)
    valid = element < numel.to(tl.int64) * UNIT - start
    x = tl.load(weight + start + element, mask=valid, other=0.0)
    m = tl.load(mask + start + element, mask=valid, other=0.0)
    if x.dtype == tl.float64:
        y = x * m
    else:
        y = narrow(fp32(x) * fp32(m), output.dtype.element_ty)
    tl.store(output + start + element, y, mask=valid)


def _same_strides(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with its elements where ``like`` has them."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def nm_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """See ``reference/nm_mask.py``."""
    source = dense(weight)
    mask = torch.empty_like(source)
    numel = source.numel()
    if numel == 0:
        return mask
    inner = source.stride(axis) if source.size(axis) > 1 else 1
    if m in (4, 8) and inner == 1:
        tile = tiles.tile_elements(numel, source.element_size())
        unit = tiles.unit_of(numel, tile)
        programs = triton.cdiv(numel, tile)
        constants = {"N": int(n), "M": int(m), "UNIT": unit, "TILE": tile}
        launch(_neighbours, programs, source, source, mask, numel // unit, **constants, warps=4)
        return mask
    padded = triton.next_power_of_2(m)
    tile = max(1, 4096 // (padded * padded))
    groups = numel // m
    programs = triton.cdiv(groups, tile)
    constants = {"N": int(n), "M": int(m), "PADDED": padded, "TILE": tile}
    launch(_groups, programs, source, source, mask, groups, inner, **constants, warps=4)
    return mask


def _channels(source: Tensor, block_size: list[int]) -> tuple[int, int, int] | None:
    """The memory as outer x channels x inner where blocks are slices along one axis; else None."""
    grid = [axis for axis, block in enumerate(block_size) if block != source.size(axis)]
    if len(grid) > 1 or any(block_size[axis] != 1 for axis in grid):
        return None
    if not grid:
        return 1, 1, source.numel()
    channels, inner = source.size(grid[0]), source.stride(grid[0])
    return source.numel() // (channels * inner), channels, inner


def _block_norms(source: Tensor, block_size: list[int]) -> Tensor:
    """See ``reference/block_mask.py``, which also serves float64 and blocks that are not slices."""
    channels = _channels(source, block_size)
    if channels is None or source.dtype == torch.float64:
        return reference.block_norms(source, tuple(block_size))
    outer, count, inner = channels
    grid = [size // block for size, block in zip(source.shape, block_size, strict=True)]
    norms = torch.empty(grid, dtype=torch.float64, device=source.device)
    columns = inner == 1 and count > 1
    width = 32 if columns else min(1024, triton.next_power_of_2(inner))
    programs = triton.cdiv(count, width) if columns else count
    constants = {"COLUMNS": columns, "ROWS": 1024 // width, "WIDTH": width}
    launch(_norms, programs, source, source, norms, count, outer, inner, **constants, warps=4)
    return norms


def top_blocks(weight: Tensor, num_keep: int, block_size: list[int]) -> Tensor:
    """See ``reference/block_mask.py``."""
    chosen = weight.new_empty([size // block for size, block in zip(weight.shape, block_size, strict=True)])
    if weight.numel() == 0:
        return chosen
    if not wide.has_float64(weight.device):
        return reference.top_blocks(weight, num_keep, tuple(block_size))
    norms = _block_norms(dense(weight), block_size)
    return chosen.copy_(torch.ops.coreai_kernels.topk_mask(norms, num_keep))


def block_mask(weight: Tensor, num_keep: int, block_size: list[int]) -> Tensor:
    """See ``reference/block_mask.py``."""
    source = dense(weight)
    if source.numel() == 0:
        return torch.empty_like(source)
    expanded = top_blocks(source, num_keep, block_size)
    for axis, block in enumerate(block_size):
        if block > 1 and expanded.size(axis) > 1:
            expanded = expanded.repeat_interleave(block, axis)
    return torch.empty_like(source).copy_(expanded)


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """See ``reference/apply_mask.py``."""
    source = dense(weight)
    factor = _same_strides(mask, source)
    output = torch.empty_like(source)
    numel = source.numel()
    if numel:
        tile, unit = tiles.tile_elements(numel, source.element_size()), tiles.unit_of(numel)
        programs = triton.cdiv(numel, tile)
        launch(
            _product, programs, source, source, factor, output, numel // unit, UNIT=unit, TILE=tile, warps=4
        )
    return output
