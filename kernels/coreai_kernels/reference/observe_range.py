"""Minimum and maximum of each block."""

import torch
from torch import Tensor

from coreai_kernels.reference.layout import split_blocks
from coreai_kernels.types import grid_shape

__all__ = ["observe_range"]


def observe_range(input: Tensor, block_size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Grid-shaped minimum and maximum in the input's dtype. NaN wins; a zero comes out as ``+0.0``."""
    grid = grid_shape(input.shape, block_size)
    if input.dtype == torch.float64:
        low, high = observe_range(input.float(), block_size)
        return low.double(), high.double()
    if input.dim() == 0:
        return input + 0.0, input + 0.0
    blocks, axes = split_blocks(input, block_size)
    low, high = torch.amin(blocks, axes), torch.amax(blocks, axes)
    # Which zero a reduction meets first is a matter of order; adding +0.0 makes the result one.
    return (low + 0.0).reshape(grid), (high + 0.0).reshape(grid)
