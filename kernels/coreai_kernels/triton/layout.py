"""Blocks in memory order: what the kernels know about a tensor's shape.

Every axis splits into ``(grid, block)``. In memory order, with the ones dropped and neighbours merged that
step alike through the grid, a short list of levels remains. A level is ``(size, stride)``, where ``stride``
is its step in the grid-shaped parameter tensors: 0 for a block level.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.types import grid_shape

__all__ = [
    "Geometry",
    "Level",
    "StridedReduction",
    "TileShape",
    "dense",
    "geometry_of",
    "grid_index",
    "power_of_two",
]

Level = tuple[int, int]

# Elements from which positions do not fit 32 bits.
_WIDE_FROM = 1 << 31


@triton.jit
def grid_index(position, sizes, strides, LEVELS: tl.constexpr):
    """Index into the parameters for a position in memory. Sizes and strides: innermost level first."""
    index = position * 0
    for level in tl.static_range(LEVELS):
        if level == LEVELS - 1:
            index += position * strides[level]
        else:
            outer = position // sizes[level]
            index += (position - outer * sizes[level]) * strides[level]
            position = outer
    return index


class TileShape(NamedTuple):
    """What a kernel over strided reductions is compiled for.

    Attributes:
        levels: of the rows of blocks.
        width_unit, run_unit, blocks_unit: what the numbers that the kernel is called with are multiples of;
            ``run_unit`` is 0 if the run is that of the tile.
        wide: whether positions need 64 bits.
        full: whether tiles cover blocks without a rest.
        depth, blocks, run: of a tile.
        pieces: pieces of a block that a thread has.
    """

    levels: int
    width_unit: int
    run_unit: int
    blocks_unit: int
    wide: bool
    full: bool
    depth: int
    blocks: int
    run: int
    pieces: int = 1


@dataclass(frozen=True, slots=True)
class StridedReduction:
    """Levels as ``outer`` × ``depth`` × ``blocks`` × ``run``: blocks that lie side by side.

    A block is ``depth`` pieces of ``run`` neighbouring elements, ``blocks * run`` apart. ``outer`` and
    ``blocks`` are grid levels.
    """

    outer: tuple[Level, ...]
    depth: int
    blocks: int
    block_stride: int
    run: int

    @property
    def outer_size(self) -> int:
        """Number of rows of blocks."""
        size = 1
        for level, _ in self.outer:
            size *= level
        return size

    @property
    def width(self) -> int:
        """Elements from one piece of a block to its next."""
        return self.blocks * self.run


@dataclass(frozen=True, slots=True)
class Geometry:
    """A dense tensor cut into blocks.

    Attributes:
        numel: elements.
        grid: shape of the parameters.
        blocks: number of blocks.
        levels: merged levels, outermost first.
        strided: the same as a :class:`StridedReduction`, if they are one.
        grid_parts: grid levels by ``(size, memory stride, grid stride)``, innermost first.
        block_parts: block levels by ``(size, memory stride)``, innermost first.
        wide: whether positions need 64 bits.
    """

    numel: int
    grid: tuple[int, ...]
    blocks: int
    levels: tuple[Level, ...]
    strided: StridedReduction | None
    grid_parts: tuple[tuple[int, int, int], ...]
    block_parts: tuple[tuple[int, int], ...]
    wide: bool

    def inner_first(self, skip: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes and strides as :func:`grid_index` takes them, without the ``skip`` innermost levels."""
        chosen = self.levels[: len(self.levels) - skip][::-1]
        return tuple(size for size, _ in chosen), tuple(stride for _, stride in chosen)


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def dense(x: Tensor) -> Tensor:
    """``x``, or a copy in the same memory format if ``x`` has gaps or overlaps."""
    return x if _is_dense(x.shape, x.stride()) else torch.empty_like(x).copy_(x)


def geometry_of(x: Tensor, block_size: tuple[int, ...] | list[int]) -> Geometry:
    """Geometry of a dense tensor; remembered by shape, strides and block size."""
    return _geometry(x.shape, x.stride(), tuple(block_size))


@functools.lru_cache(maxsize=8192)
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted((t, s) for s, t in zip(shape, strides, strict=True) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


@functools.lru_cache(maxsize=8192)
def _geometry(shape: torch.Size, strides: tuple[int, ...], block_size: tuple[int, ...]) -> Geometry:
    grid = grid_shape(shape, block_size)
    grid_strides = [1] * len(grid)
    for axis in range(len(grid) - 2, -1, -1):
        grid_strides[axis] = grid_strides[axis + 1] * grid[axis + 1]
    order = sorted((axis for axis in range(len(shape)) if shape[axis] > 1), key=lambda axis: -strides[axis])
    levels: list[Level] = []
    for axis in order:
        for size, stride in ((grid[axis], grid_strides[axis]), (block_size[axis], 0)):
            if size == 1:
                continue
            if levels and levels[-1][1] == stride * size and (levels[-1][1] == 0) == (stride == 0):
                levels[-1] = (levels[-1][0] * size, stride)
            else:
                levels.append((size, stride))
    grid_parts, block_parts, memory_stride = [], [], 1
    for size, stride in reversed(levels):
        if stride:
            grid_parts.append((size, memory_stride, stride))
        else:
            block_parts.append((size, memory_stride))
        memory_stride *= size
    blocks = 1
    for n in grid:
        blocks *= n
    return Geometry(
        numel=shape.numel(),
        grid=grid,
        blocks=blocks,
        levels=tuple(levels),
        strided=_strided_reduction(levels),
        grid_parts=tuple(grid_parts),
        block_parts=tuple(block_parts),
        wide=shape.numel() >= _WIDE_FROM,
    )


def _strided_reduction(levels: list[Level]) -> StridedReduction | None:
    rest = list(levels)
    run = rest.pop()[0] if rest and rest[-1][1] == 0 else 1
    blocks, block_stride = rest.pop() if rest else (1, 0)
    depth = rest.pop()[0] if rest and rest[-1][1] == 0 else 1
    if any(stride == 0 for _, stride in rest):
        return None
    return StridedReduction(tuple(rest), depth, blocks, block_stride, run)
