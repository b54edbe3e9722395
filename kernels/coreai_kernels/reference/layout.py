"""Blocks and memory order, as views."""

import math

import torch
from torch import Tensor

from coreai_kernels.types import grid_shape

__all__ = [
    "from_memory_order",
    "from_vectors",
    "in_format_of",
    "in_memory_order",
    "memory_order",
    "per_block",
    "split_blocks",
    "to_vectors",
]


def split_blocks(x: Tensor, block_size: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """View ``x`` of shape ``(s0, ...)`` as ``(g0, b0, g1, b1, ...)``, and the positions of the ``b`` axes."""
    shape: list[int] = []
    for grid, block in zip(grid_shape(x.shape, block_size), block_size, strict=True):
        shape += [grid, block]
    return x.reshape(shape), list(range(1, 2 * x.dim(), 2))


def per_block(values: Tensor, x: Tensor, block_size: tuple[int, ...]) -> Tensor:
    """Broadcast a grid-shaped tensor to the shape of ``x``."""
    expanded = values.reshape([n for g in grid_shape(x.shape, block_size) for n in (g, 1)])
    shape = [n for g, b in zip(grid_shape(x.shape, block_size), block_size, strict=True) for n in (g, b)]
    return expanded.expand(shape).reshape(x.shape)


def memory_order(x: Tensor) -> list[int]:
    """Axes of a dense tensor from the outermost in memory to the innermost; axes of size one come last."""
    strides = x.stride()
    wide = [axis for axis, size in enumerate(x.shape) if size != 1]
    ones = [axis for axis, size in enumerate(x.shape) if size == 1]
    order: list[int] = []
    for axis in wide:
        # By insertion: torch.compile does not sort by strides that are symbols.
        place = len(order)
        while place > 0 and strides[order[place - 1]] < strides[axis]:
            place -= 1
        order.insert(place, axis)
    return order + ones


def in_memory_order(x: Tensor, order: list[int]) -> Tensor:
    """The elements of ``x``, flattened with ``order[0]`` outermost."""
    return x.permute(order).reshape(-1)


def from_memory_order(flat: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """Inverse of :func:`in_memory_order`; the result's memory is laid out in ``order``."""
    inverse = [0] * len(order)
    for position, axis in enumerate(order):
        inverse[axis] = position
    return flat.reshape([shape[axis] for axis in order]).permute(inverse)


def in_format_of(pattern: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` in ``dtype``, by default that of ``pattern``, and in its memory format."""
    result = torch.empty_like(pattern, dtype=dtype).copy_(values)
    # The compiler of torch 2.11 has a function of autograd return all tensors that it makes, and of two that
    # are the same the gradient of the first is lost.
    return result.clone() if torch.compiler.is_compiling() else result


def to_vectors(x: Tensor, block_size: tuple[int, ...], dim: int = 1) -> Tensor:
    """The blocks of ``x`` as vectors of ``dim`` consecutive entries of axis 0: ``(blocks, vectors, dim)``.

    Blocks, and the vectors within one, come in row-major order. A view where the strides allow it.
    """
    if x.dim() == 0:
        return x.reshape(1, 1, 1)
    axes, _ = _vector_axes(x.dim())
    grid, shape = _vector_shape(x.shape, block_size, dim)
    split = x.reshape(shape).permute(axes)
    vectors = math.prod(split.shape[len(grid) : -1])
    return split.reshape(math.prod(grid), vectors, dim)


def from_vectors(vectors: Tensor, shape: torch.Size | tuple[int, ...], block_size: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`to_vectors`: a tensor of shape ``shape``."""
    if len(shape) == 0:
        return vectors.reshape(())
    axes, inverse = _vector_axes(len(shape))
    _, split = _vector_shape(shape, block_size, vectors.size(-1))
    return vectors.reshape([split[axis] for axis in axes]).permute(inverse).reshape(shape)


def _vector_shape(
    shape: torch.Size | tuple[int, ...], block_size: tuple[int, ...], dim: int
) -> tuple[tuple[int, ...], list[int]]:
    """The grid, and the split shape ``(g0, b0 / dim, dim, g1, b1, ...)``."""
    grid = grid_shape(shape, block_size)
    split = [grid[0], block_size[0] // dim, dim]
    for pair in zip(grid[1:], block_size[1:], strict=True):
        split += pair
    return grid, split


def _vector_axes(rank: int) -> tuple[list[int], list[int]]:
    """Permutation of the split shape to ``(g0, g1, ..., b0 / dim, b1, ..., dim)``, and its inverse."""
    axes = [0, *range(3, 2 * rank, 2), 1, *range(4, 2 * rank + 1, 2), 2]
    inverse = [axes.index(position) for position in range(len(axes))]
    return axes, inverse
