"""Which blocks have the largest L1 norms."""

import torch
from torch import Tensor

from coreai_kernels.reference.layout import per_block, split_blocks
from coreai_kernels.reference.topk_mask import topk_mask
from coreai_kernels.types import grid_shape

__all__ = ["block_mask", "block_norms", "top_blocks"]


def block_norms(weight: Tensor, block_size: tuple[int, ...]) -> Tensor:
    """L1 norm of each block, in float64 and the same whatever the order of the additions.

    Magnitudes are rounded (half to even) to multiples of a unit, and the counts of units are added up, which
    are integers (Demmel and Nguyen, Fast Reproducible Floating-Point Summation, ARITH 2013). The unit follows
    from the largest magnitude of the block alone: if that is less than ``2**g``, with ``g`` the least such
    multiple of four, the unit is ``2**(g - 28)``. No magnitude is rounded more coarsely than float32 rounds
    the largest of them: the sum of ``n`` is off by at most ``n / 2**25`` times the largest, which is less
    than the bound for a sum in float32. Units below 2**-1022 become that.
    """
    grid = grid_shape(weight.shape, block_size)
    blocks, axes = split_blocks(weight.double().abs(), block_size)
    peak = blocks.amax(axes, keepdim=True)
    exponent = ((peak.view(torch.int64) >> 52) + 1) // 4 * 4 + 3 - 28
    unit = (exponent.clamp_min(1) << 52).view(torch.float64)
    finite = peak.isfinite()
    counts = torch.round(torch.where(finite, blocks, 0.0) / unit).long().sum(axes, keepdim=True)
    return torch.where(finite, counts.double() * unit, peak).reshape(grid)


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
