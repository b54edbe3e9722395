"""Rounding to a number format: the one place where the bits of fp8 and fp4 are spelled out in torch."""

import torch
from torch import Tensor

from coreai_kernels.formats import Format

__all__ = ["round_to_format"]


def round_to_format(x: Tensor, fmt: Format) -> Tensor:
    """Round float32 values to the nearest value of floating-point format ``fmt``, ties to even, in float32.

    ``x`` must already lie in the format's finite range, or be NaN, which stays NaN. The sign of zero is kept.

    Adding and subtracting a power of two ``2**(e + 23 - mantissa_bits)`` rounds at the mantissa's last bit;
    clamping ``e`` from below at the format's smallest exponent makes the subnormals come out right.
    """
    facts = fmt.facts
    magnitude = x.abs()
    exponent_bits = magnitude.view(torch.int32) & 0x7F800000
    lowest = (127 + facts.min_exponent) << 23
    magic_bits = exponent_bits.clamp(min=lowest) + ((23 - facts.mantissa_bits) << 23)
    magic = magic_bits.view(torch.float32)
    return torch.where(x.isnan(), x, torch.copysign((magnitude + magic) - magic, x))
