"""``observe_range``: minimum and maximum of each block; also the reduction that precedes a quantization."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.triton.elementwise import block_range, fp32, wider_range
from coreai_kernels.triton.launch import launch, multiprocessors
from coreai_kernels.triton.layout import Geometry, TileShape, dense, geometry_of, grid_index, power_of_two
from coreai_kernels.triton.qparams import Constants, finish, tl_dtype
from coreai_kernels.triton.tiles import unit_of

__all__ = ["Partials", "finish_blocks", "observe", "observe_range", "reduce_blocks"]

# Elements that a program of 128 threads reads at a time, and the most programs that share a block.
_TILE = 4096
_MOST_PARTS = 1024


@triton.jit
def _values(
    input,
    tile,
    d,
    r,
    valid_block,
    step,
    run_steps,
    depth,
    run,
    width,
    SHAPE: tl.constexpr,
    ONE_RUN: tl.constexpr,
    ONE_DEPTH: tl.constexpr,
):
    """Minima and maxima of the pieces that a thread has in a step: where there are none, infinities."""
    if ONE_RUN:
        d0 = tl.cast(step, tl.int64) * SHAPE.depth
        r0 = 0
    elif ONE_DEPTH:
        d0 = 0
        r0 = tl.cast(step, tl.int64) * SHAPE.run
    else:
        d0 = tl.cast(step // run_steps, tl.int64) * SHAPE.depth
        r0 = tl.cast(step % run_steps, tl.int64) * SHAPE.run
    if SHAPE.full:
        low = fp32(tl.load(input + (d0 * width + r0) + tile, mask=valid_block, other=0.0))
        high = low
    else:
        valid = valid_block & (d < depth - d0) & (r < run - r0)
        x = fp32(tl.load(input + (d0 * width + r0) + tile, mask=valid, other=0.0))
        low = tl.where(valid, x, float("inf"))
        high = tl.where(valid, x, float("-inf"))
    if SHAPE.pieces > 1:
        low = _in_pieces(low, SHAPE)
        high = _in_pieces(high, SHAPE)
        low, high = block_range(low, high, 0)
    return low, high


@triton.jit
def _in_pieces(x, SHAPE: tl.constexpr):
    """A tile with an axis of pieces in front: parts of its depth or, where that is one, of its run."""
    if SHAPE.depth > 1:
        x = tl.reshape(x, (SHAPE.pieces, SHAPE.depth // SHAPE.pieces, SHAPE.blocks, SHAPE.run))
    else:
        x = tl.reshape(x, (SHAPE.pieces, 1, SHAPE.blocks, SHAPE.run // SHAPE.pieces))
    return x


@triton.jit(
    do_not_specialize=[
        "depth",
        "width",
        "run",
        "blocks",
        "chunks",
        "parts",
        "steps",
        "rest",
        "run_steps",
        "all_blocks",
        "sizes",
        "strides",
    ]
)
def _strided(
    input,
    partial_low,
    partial_high,
    depth,
    width,
    run,
    blocks,
    block_stride,
    chunks,
    parts,
    steps,
    rest,
    run_steps,
    all_blocks,
    sizes,
    strides,
    state,
    numbers,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
    ONE_RUN: tl.constexpr,
    ONE_DEPTH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Ranges of ``SHAPE.blocks`` blocks of a strided reduction, or of one part of them.

    A part takes ``steps``, the first ``rest`` parts one more.
    """
    if SHAPE.wide:
        width = width.to(tl.int64)
        run = run.to(tl.int64)
    width = width * SHAPE.width_unit
    if SHAPE.run_unit == 0:
        run = SHAPE.run
    else:
        run = run * SHAPE.run_unit
    blocks = blocks * SHAPE.blocks_unit
    program = tl.program_id(0)
    if ONE_BLOCK:
        chunk = program * 0
        part = program
        outer = chunk
    elif SPLIT:
        chunk = program % chunks
        part = (program // chunks) % parts
        outer = program // (chunks * parts)
    else:
        chunk = program % chunks
        part = chunk * 0
        outer = program // chunks
    d = tl.arange(0, SHAPE.depth)[:, None, None]
    b = tl.arange(0, SHAPE.blocks)[None, :, None]
    r = tl.arange(0, SHAPE.run)[None, None, :]
    valid_block = chunk * SHAPE.blocks + b < blocks
    start = outer.to(tl.int64) * depth * width + chunk.to(tl.int64) * SHAPE.blocks * run
    tile = d * width + b * run + r
    first = 0
    last = steps
    if SPLIT:
        first = part * steps + tl.minimum(part, rest)
        last = first + steps + (part < rest).to(tl.int32)
    if SHAPE.depth == 1:  # there is a first step: no infinities have to be put in registers
        low, high = _values(
            input + start,
            tile,
            d,
            r,
            valid_block,
            first,
            run_steps,
            depth,
            run,
            width,
            SHAPE,
            ONE_RUN,
            ONE_DEPTH,
        )
        first += 1
    else:
        low = tl.full((SHAPE.depth // SHAPE.pieces, SHAPE.blocks, SHAPE.run), float("inf"), tl.float32)
        high = tl.full((SHAPE.depth // SHAPE.pieces, SHAPE.blocks, SHAPE.run), float("-inf"), tl.float32)
    for step in range(first, last):
        other_low, other_high = _values(
            input + start,
            tile,
            d,
            r,
            valid_block,
            step,
            run_steps,
            depth,
            run,
            width,
            SHAPE,
            ONE_RUN,
            ONE_DEPTH,
        )
        low, high = wider_range(low, high, other_low, other_high)
    low, high = block_range(low, high, 2)
    low, high = block_range(low, high, 0)
    block = chunk * SHAPE.blocks + tl.arange(0, SHAPE.blocks)
    index = grid_index(outer, sizes, strides, SHAPE.levels).to(tl.int64) + block.to(tl.int64) * block_stride
    if SPLIT:
        place = part.to(tl.int64) * all_blocks + index
        tl.store(partial_low + place, low, mask=block < blocks)
        tl.store(partial_high + place, high, mask=block < blocks)
        if state[7] is not None:
            # The old range is kept aside: programs of the next kernel all read it, one overwrites it.
            tl.store(state[7], tl.load(state[0]), mask=program == 0)
            tl.store(state[7] + 1, tl.load(state[1]), mask=program == 0)
    else:
        finish(low, high, index, block < blocks, block < blocks, state, numbers, CONFIG, DTYPE)


@triton.jit(
    do_not_specialize=[
        "numel",
        "grid_sizes",
        "grid_steps",
        "grid_strides",
        "block_sizes",
        "block_steps",
    ]
)
def _any_block(
    input,
    numel,
    grid_sizes,
    grid_steps,
    grid_strides,
    block_sizes,
    block_steps,
    state,
    numbers,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    GRID_LEVELS: tl.constexpr,
    BLOCK_LEVELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Range of one block of any form: every element's place is computed."""
    program = tl.program_id(0).to(tl.int64)
    start = grid_index(program, grid_sizes, grid_steps, GRID_LEVELS)
    low = tl.full((TILE,), float("inf"), tl.float32)
    high = tl.full((TILE,), float("-inf"), tl.float32)
    for first in range(0, numel, TILE):
        element = first + tl.arange(0, TILE).to(tl.int64)
        valid = element < numel
        place = grid_index(element, block_sizes, block_steps, BLOCK_LEVELS)
        x = fp32(tl.load(input + start + place, mask=valid, other=0.0))
        low, high = wider_range(
            low, high, tl.where(valid, x, float("inf")), tl.where(valid, x, float("-inf"))
        )
    low, high = block_range(low[None, :], high[None, :], 1)
    index = grid_index(program, grid_sizes, grid_strides, GRID_LEVELS) + tl.arange(0, 1)
    finish(low, high, index, None, None, state, numbers, CONFIG, DTYPE)


@triton.jit(do_not_specialize=["parts"])
def _finish(
    partial_low,
    partial_high,
    parts,
    blocks,
    state,
    numbers,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Ranges of the blocks from the ranges of their parts."""
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    part = tl.arange(0, PARTS)[:, None]
    place = part.to(tl.int64) * blocks + index[None, :]
    valid = (part < parts) & (index < blocks)[None, :]
    low = tl.load(partial_low + place, mask=valid, other=float("inf"))
    high = tl.load(partial_high + place, mask=valid, other=float("-inf"))
    low, high = block_range(low, high, 0)
    finish(low, high, index, index < blocks, index < blocks, state, numbers, CONFIG, DTYPE)


@dataclass(frozen=True, slots=True)
class Partials:
    """Ranges of ``parts`` parts of each block: two tensors of shape ``(parts, blocks)``."""

    low: Tensor
    high: Tensor
    parts: int


@functools.lru_cache(maxsize=8192)
def _plan(
    geometry: Geometry, element_size: int, multiprocessor_count: int
) -> tuple[int, int, tuple[Any, ...], dict[str, Any]]:
    """Parts of a block, number of programs, arguments and constants for :func:`_strided`.

    A tile is 128 bytes wide at least, where the tensor is; blocks are split until there are four programs for
    each multiprocessor.
    """
    strided = geometry.strided
    if strided is None:
        raise ValueError("these blocks are no strided reduction")
    run = min(power_of_two(strided.run), _TILE)
    side_by_side = max(1, 128 // (run * element_size))
    if strided.depth * strided.run < _TILE // 4:
        side_by_side = max(side_by_side, _TILE // (power_of_two(strided.depth) * run))
    blocks = min(power_of_two(strided.blocks), side_by_side)
    depth = min(power_of_two(strided.depth), max(1, _TILE // (run * blocks)))
    chunks = triton.cdiv(strided.blocks, blocks)
    run_steps = triton.cdiv(strided.run, run)
    steps = triton.cdiv(strided.depth, depth) * run_steps
    whole = strided.outer_size * chunks
    parts = max(1, min(steps, _MOST_PARTS, triton.cdiv(4 * multiprocessor_count, whole)))
    width_unit, blocks_unit = unit_of(strided.width), unit_of(strided.blocks)
    run_unit = 0 if run == strided.run else unit_of(strided.run)
    sizes = tuple(size for size, _ in reversed(strided.outer))
    strides = tuple(stride for _, stride in reversed(strided.outer))
    arguments = (
        strided.depth,
        strided.width // width_unit,
        strided.run // (run_unit or 1),
        strided.blocks // blocks_unit,
        strided.block_stride,
        chunks,
        parts,
        *divmod(steps, parts),
        run_steps,
        geometry.blocks,
        sizes,
        strides,
    )
    # 128 threads take 16 bytes each at a time.
    pieces = depth * blocks * run // (128 * min(16 // element_size, blocks * run))
    pieces = max(1, min(pieces, depth if depth > 1 else run)) if depth > 1 or blocks == 1 else 1
    shape = TileShape(
        levels=len(sizes),
        width_unit=width_unit,
        run_unit=run_unit,
        blocks_unit=blocks_unit,
        wide=geometry.wide,
        full=strided.depth % depth == 0 and strided.run % run == 0,
        depth=depth,
        blocks=blocks,
        run=run,
        pieces=pieces,
    )
    constants = {
        "SHAPE": shape,
        "ONE_RUN": run_steps == 1,
        "ONE_DEPTH": depth >= strided.depth,
        "ONE_BLOCK": whole == 1,
        "SPLIT": parts > 1,
    }
    return parts, whole * parts, arguments, constants


def reduce_blocks(
    geometry: Geometry,
    input: Tensor,
    state: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: Constants | None,
    keep_old: Tensor | None = None,
) -> Partials | None:
    """Range of each block of a dense tensor, finished as :func:`coreai_kernels.triton.qparams.finish` says.

    Returns:
        None if that is done. Else the ranges of parts of the blocks, for :func:`finish_blocks`; ``keep_old``
        then holds a copy of the old range (of the only block).
    """
    dtype = tl_dtype(input.dtype)
    if geometry.strided is None:
        grid, block = geometry.grid_parts, geometry.block_parts
        launch(
            _any_block,
            geometry.blocks,
            input,
            input,
            geometry.numel // geometry.blocks,
            tuple(size for size, _, _ in grid),
            tuple(step for _, step, _ in grid),
            tuple(stride for _, _, stride in grid),
            tuple(size for size, _ in block),
            tuple(step for _, step in block),
            state,
            numbers,
            CONFIG=constants,
            DTYPE=dtype,
            GRID_LEVELS=len(grid),
            BLOCK_LEVELS=len(block),
            TILE=min(1024, power_of_two(geometry.numel // geometry.blocks)),
            warps=4,
        )
        return None
    parts, programs, arguments, shape = _plan(geometry, input.element_size(), multiprocessors(input))
    partials = None
    if parts > 1:
        low, high = torch.empty(
            (2, parts, geometry.blocks), dtype=torch.float32, device=input.device
        ).unbind()
        partials = Partials(low, high, parts)
    launch(
        _strided,
        programs,
        input,
        input,
        partials and partials.low,
        partials and partials.high,
        *arguments,
        (*state, keep_old if parts > 1 else None),
        numbers,
        CONFIG=constants,
        DTYPE=dtype,
        warps=4,
        **shape,
    )
    return partials


def finish_blocks(
    geometry: Geometry,
    partials: Partials,
    dtype: torch.dtype,
    state: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...],
    constants: Constants | None,
) -> None:
    """Finish what :func:`reduce_blocks` left in parts."""
    parts = power_of_two(partials.parts)
    blocks = min(power_of_two(geometry.blocks), max(1, 1024 // parts))
    launch(
        _finish,
        triton.cdiv(geometry.blocks, blocks),
        partials.low,
        partials.low,
        partials.high,
        partials.parts,
        geometry.blocks,
        state,
        numbers,
        CONFIG=constants,
        DTYPE=tl_dtype(dtype),
        PARTS=parts,
        BLOCKS=blocks,
        warps=4,
    )


def observe(
    geometry: Geometry,
    input: Tensor,
    state: tuple[Tensor | None, ...],
    numbers: tuple[Any, ...] = (),
    constants: Constants | None = None,
) -> None:
    """Range of each block of a dense tensor, and what follows from it, in one or two launches."""
    partials = reduce_blocks(geometry, input, state, numbers, constants)
    if partials is not None:
        finish_blocks(geometry, partials, input.dtype, state, numbers, constants)


def observe_range(input: Tensor, block_size: list[int]) -> tuple[Tensor, Tensor]:
    """See ``reference/observe_range.py``."""
    input = dense(input)
    geometry = geometry_of(input, block_size)
    low = torch.empty(geometry.grid, dtype=input.dtype, device=input.device)
    high = torch.empty_like(low)
    observe(geometry, input, (None, None, None, None, None, low, high))
    return low, high
