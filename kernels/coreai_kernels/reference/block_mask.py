"""Which blocks have the largest L1 norms."""

import torch
from torch import Tensor

from coreai_kernels import wide
from coreai_kernels.reference.layout import in_format_of, per_block, split_blocks
from coreai_kernels.reference.magnitude import magnitude_keys
from coreai_kernels.reference.topk_mask import largest
from coreai_kernels.types import grid_shape

__all__ = ["block_mask", "block_norms", "norm_bits", "top_blocks"]

# Bits in float64. That NaN is the one that ranks as all of them do.
_INFINITY, _NAN = 0x7FF << 52, 2**63 - 1


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


def norm_bits(weight: Tensor, block_size: tuple[int, ...]) -> Tensor:
    """The bits of :func:`block_norms` as int64, by float32 and integers: for devices without float64.

    Magnitudes are divided by the unit in two steps, for a power of two may be out of float32's range. They
    count as float32: wider ones are not on such devices.
    """
    grid = grid_shape(weight.shape, block_size)
    blocks, axes = split_blocks(weight.float().abs(), block_size)
    peak = blocks.amax(axes, keepdim=True)
    finite = peak.isfinite()
    # As float64 would have it: float32's subnormals have exponents of their own.
    bits, as_normal = peak.view(torch.int32), (peak * 2.0**64).view(torch.int32)
    exponent = torch.where(bits >= 1 << 23, (bits >> 23) + 896, (as_normal >> 23) + 832)
    exponent = torch.where(peak == 0, 0, exponent)
    unit = ((exponent + 1) // 4 * 4 + 3 - 28).clamp_min(1)
    shift = 1023 - unit
    first = shift.clamp(-126, 126)
    counts = torch.where(finite, blocks, 0.0) * _power_of_two(first) * _power_of_two(shift - first)
    total = torch.round(counts).long().sum(axes, keepdim=True)
    of_peak = torch.where(peak.isnan(), _NAN, _INFINITY)
    return torch.where(finite, _scaled_bits(total, unit), of_peak).reshape(grid)


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2**exponent`` in float32, for normal results."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _scaled_bits(count: Tensor, unit: Tensor) -> Tensor:
    """Bits of the float64 nearest to ``count * 2**(unit - 1023)``, for counts below ``2**62``."""
    length = torch.zeros_like(count)
    rest = count
    for step in (32, 16, 8, 4, 2, 1):
        longer = rest >> step > 0
        length = torch.where(longer, length + step, length)
        rest = torch.where(longer, rest >> step, rest)
    # The leading bit becomes bit 52. What is shifted out is rounded, half to even.
    left, right = (52 - length).clamp_min(0), (length - 52).clamp_min(0)
    odd = (count >> right) & 1
    half = torch.where(right > 0, (1 << (right - 1).clamp_min(0)) - 1 + odd, 0)
    significand = ((count << left) + half) >> right
    # Added to the exponent, the leading bit counts one; a carry in rounding makes it two.
    return torch.where(count == 0, 0, ((unit.long() + length - 1) << 52) + significand)


def top_blocks(weight: Tensor, num_keep: int, block_size: tuple[int, ...]) -> Tensor:
    """One for each of the ``num_keep`` blocks of largest L1 norm, else zero; the lower block index first."""
    grid = grid_shape(weight.shape, tuple(block_size))
    chosen = weight.new_empty(grid)
    if weight.numel() == 0:
        return chosen
    if wide.has_float64(weight.device):
        keys = magnitude_keys(block_norms(weight, tuple(block_size)))
    else:
        keys = norm_bits(weight, tuple(block_size))
    return chosen.copy_(largest(keys.reshape(-1), num_keep).reshape(grid))


def block_mask(weight: Tensor, num_keep: int, block_size: tuple[int, ...]) -> Tensor:
    """The ones and zeros of :func:`top_blocks`, for every element of a block."""
    if weight.numel() == 0:
        return torch.empty_like(weight)
    chosen = top_blocks(weight, num_keep, block_size)
    return in_format_of(weight, per_block(chosen, weight, block_size))
