"""The vocabulary of the engine beside the formats: range schemes, range updates, grids of blocks.

The integer values are part of the operator schemas and of the native code (``csrc/common/types.h``).
"""

from enum import IntEnum

import torch

__all__ = ["RangeUpdate", "Scheme", "grid_shape"]


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
