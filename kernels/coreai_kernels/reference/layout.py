"""Blocks and memory order, as views."""

import torch
from torch import Tensor

from coreai_kernels.types import grid_shape

__all__ = ["from_memory_order", "in_memory_order", "memory_order", "per_block", "split_blocks"]


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
    return sorted(wide, key=lambda axis: -strides[axis]) + ones


def in_memory_order(x: Tensor, order: list[int]) -> Tensor:
    """The elements of ``x``, flattened with ``order[0]`` outermost."""
    return x.permute(order).reshape(-1)


def from_memory_order(flat: Tensor, shape: torch.Size, order: list[int]) -> Tensor:
    """Inverse of :func:`in_memory_order`; the result's memory is laid out in ``order``."""
    inverse = [0] * len(order)
    for position, axis in enumerate(order):
        inverse[axis] = position
    return flat.reshape([shape[axis] for axis in order]).permute(inverse)
