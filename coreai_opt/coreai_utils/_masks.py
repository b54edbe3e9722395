"""Which elements of a program's weights stay."""

import numpy as np
import torch
from torch import Tensor

import coreai_kernels
from coreai_kernels.ops.nm_mask import LARGEST_GROUP
from coreai_opt.coreai_utils._program import Unsuitable

__all__ = ["block_mask", "magnitude_mask", "nm_mask", "selected"]


def magnitude_mask(values: Tensor, sparsity: float) -> Tensor:
    """Whether each element is larger in magnitude than the quantile of the magnitudes at ``sparsity``."""
    return _above_quantile(values, sparsity)


def selected(values: Tensor, mask: Tensor) -> Tensor:
    """``values[mask]``, without a list of the places."""
    flat = values.reshape(-1)
    numbers = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat  # numpy has no bfloat16
    kept = np.compress(mask.reshape(-1).numpy(), numbers.numpy())
    return torch.from_numpy(kept).view(flat.dtype)


def block_mask(values: Tensor, sparsity: float, block_size: int, axis: int) -> Tensor:
    """The same for blocks of slices along ``axis``, by their L2 norm; the last block may be cut short."""
    channels = values.shape[axis]
    if axis > 1 or block_size > channels / 2:
        raise Unsuitable(f"blocks of {block_size} along axis {axis} of {channels} channels")
    moved = values.movedim(axis, 0)
    padded = torch.cat([moved, moved.new_zeros(-channels % block_size, *moved.shape[1:])])
    norms = padded.reshape(-1, block_size, *moved.shape[1:]).float().pow(2).sum(1).sqrt()
    # A block counts as often as it has elements: the fraction is one of elements, even if the last is cut.
    of_elements = norms.repeat_interleave(block_size, 0)[:channels]
    return _above_quantile(of_elements, sparsity).movedim(0, axis)


def nm_mask(values: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Whether each element is not among the ``n`` smallest of ``m`` neighbours along ``axis``."""
    channels = values.shape[axis]
    if axis > 1 or m > channels / 2:
        raise Unsuitable(f"{n}:{m} sparsity along axis {axis} of {channels} channels")
    moved = values.movedim(axis, -1)
    rest = -channels % m
    padded = torch.nn.functional.pad(moved, (0, rest)) if rest else moved
    if 0 < n < m <= LARGEST_GROUP:
        # Of equal magnitudes the kernel keeps the first; here the first goes, as in a stable sort.
        kept = (coreai_kernels.nm_mask(padded.flip(-1).contiguous(), m - n, m) != 0).flip(-1)
    else:
        groups = padded.unflatten(-1, (-1, m))
        smallest = groups.abs().argsort(dim=-1, stable=True)[..., :n]
        kept = torch.ones_like(groups, dtype=torch.bool).scatter(-1, smallest, False).flatten(-2)
    return kept[..., :channels].movedim(-1, axis)


def _above_quantile(values: Tensor, sparsity: float) -> Tensor:
    """Whether each magnitude lies above their quantile, interpolated between neighbours.

    The neighbours are found by selection: nothing is sorted.
    """
    if sparsity <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    if sparsity >= 1:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.reshape(-1)
    # As numpy has it for a percentage.
    below = int(100 * sparsity / 100 * (flat.numel() - 1))
    # No value lies between the two neighbours, so that what is above the lower one is above the quantile.
    kept = coreai_kernels.topk_mask(flat, flat.numel() - below - 1)
    rest = torch.addcmul(flat, flat, kept, value=-1)
    low, high = coreai_kernels.observe_range(rest, block_size=(flat.numel(),))
    # In memory that is there: fresh pages cost more than the arithmetic.
    magnitudes = torch.abs(flat, out=rest)
    return (magnitudes > torch.maximum(-low, high)).reshape(values.shape)
