"""The vocabulary of the engine: number formats, range schemes, range updates.

The integer values are part of the operator schemas and of the native code (``csrc/common/types.h``).
"""

import math
from enum import IntEnum

import torch

__all__ = ["Format", "RangeUpdate", "Scheme", "grid_shape", "largest_exponent"]


class Format(IntEnum):
    """The set of values that a quantized element can take.

    ``INT`` is the integers of ``[quant_min, quant_max]``. The floating-point formats are those of the OCP
    8-bit floating point (E4M3 without infinities, E5M2) and microscaling (E2M1) specifications.
    """

    INT = 0
    E4M3 = 1
    E5M2 = 2
    E2M1 = 3

    @property
    def mantissa_bits(self) -> int:
        """Stored mantissa bits. Not defined for ``INT``."""
        return _FLOAT_FACTS[self][0]

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number. Not defined for ``INT``."""
        return _FLOAT_FACTS[self][1]

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number (``emax``). Not defined for ``INT``."""
        return _FLOAT_FACTS[self][2]


_FLOAT_FACTS = {Format.E4M3: (3, -6, 8), Format.E5M2: (2, -14, 15), Format.E2M1: (1, 0, 2)}


def largest_exponent(format: int, quant_max: float) -> int:
    """Exponent of the largest quantized value, which a power-of-two scale brings the largest element to.

    That of the format if it is floating point, else of ``quant_max``: 6 for int8, up to 127.
    """
    fmt = Format(format)
    return math.frexp(quant_max)[1] - 1 if fmt == Format.INT else fmt.max_exponent


class Scheme(IntEnum):
    """How a range ``[min, max]`` becomes a scale and a zero point."""

    SYMMETRIC = 0
    SYMMETRIC_WITH_CLIPPING = 1
    ASYMMETRIC = 2


class RangeUpdate(IntEnum):
    """How a batch's range enters the running range."""

    LATEST = 0
    MOVING_AVERAGE = 1
    GLOBAL_MINMAX = 2


def grid_shape(shape: torch.Size | tuple[int, ...], block_size: tuple[int, ...]) -> tuple[int, ...]:
    """Number of blocks along each axis.

    Raises:
        ValueError: if ``block_size`` has another rank than ``shape``, holds a value below 1, or does not
            divide ``shape``.
        IndexError: if an axis and its block are empty: such a block has no range.
    """
    if len(block_size) != len(shape):
        raise ValueError(
            f"block_size must have one entry per dimension: got {tuple(block_size)} for shape {tuple(shape)}"
        )
    for axis, (size, block) in enumerate(zip(shape, block_size, strict=True)):
        if size == block == 0:
            raise IndexError(f"axis {axis} of shape {tuple(shape)} is empty: its only block has no elements")
        if block < 1 or size % block:
            raise ValueError(
                f"block_size {tuple(block_size)} does not divide shape {tuple(shape)} along axis {axis}"
            )
    return tuple(size // block for size, block in zip(shape, block_size, strict=True))
