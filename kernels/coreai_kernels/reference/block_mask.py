"""Which blocks have the largest L1 norms."""

import math

import torch
from torch import Tensor

from coreai_kernels.reference.layout import per_block, split_blocks
from coreai_kernels.reference.topk_mask import topk_mask
from coreai_kernels.types import grid_shape

__all__ = ["block_mask", "block_norms", "top_blocks"]


def block_norms(weight: Tensor, block_size: tuple[int, ...]) -> Tensor:
    """L1 norm of each block, in float64 and the same whatever the order of the additions.

    Before they are added, magnitudes are rounded (half to even) to multiples of a unit: the power of two
    ``2**(e + 1 + ceil(log2(n)) - 52)`` for a block of ``n`` elements, the largest of which has the exponent
    ``e``. So every sum is a multiple of the unit and at most 2**52 of it, which float64 holds exactly: no
    addition rounds (Demmel and Nguyen, Fast Reproducible Floating-Point Summation, ARITH 2013). A float32
    value loses nothing if it is above the largest times ``n / 2**28``. Units below 2**-1022 become that.
    """
    grid = grid_shape(weight.shape, block_size)
    blocks, axes = split_blocks(weight.double().abs(), block_size)
    peak = blocks.amax(axes, keepdim=True)
    bits_of_count = (math.prod(block_size) - 1).bit_length()
    exponent = (peak.view(torch.int64) >> 52) + 1 + bits_of_count - 52
    unit = (exponent.clamp(1, 2046) << 52).view(torch.float64)
    # Not in units: the sums of infinities and NaN come out as such.
    sums = (torch.round(blocks / unit)).sum(axes, keepdim=True) * unit
    return sums.reshape(grid)


def top_blocks(weight: Tensor, num_keep: int, block_size: tuple[int, ...]) -> Tensor:
    """One for each of the ``num_keep`` blocks of largest L1 norm, else zero; the lower block index first."""
    grid = grid_shape(weight.shape, tuple(block_size))
    chosen = weight.new_empty(grid)
    if weight.numel() == 0:
        return chosen
    return chosen.copy_(topk_mask(block_norms(weight, tuple(block_size)), num_keep))


def block_mask(weight: Tensor, num_keep: int, block_size: tuple[int, ...]) -> Tensor:
    """The ones and zeros of :func:`top_blocks`, for every element of a block."""
    if weight.numel() == 0:
        return torch.empty_like(weight)
    chosen = top_blocks(weight, num_keep, block_size)
    return torch.empty_like(weight).copy_(per_block(chosen, weight, block_size))
