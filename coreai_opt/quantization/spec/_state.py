"""Buffers that take their shape from the first tensor observed."""

from collections.abc import Sequence

import torch

__all__ = ["UNSHAPED", "is_shaped", "reshape_buffer", "same_blocks"]

# The shape before the first observation.
UNSHAPED = torch.Size([0])


def is_shaped(buffer: torch.Tensor) -> bool:
    """Whether the buffer has taken its shape."""
    return buffer.shape != UNSHAPED


def same_blocks(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two grids differ at most in axes of a single block."""
    return [size for size in shape if size != 1] == [size for size in other if size != 1]


def reshape_buffer(module: torch.nn.Module, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """Give a buffer another shape and dtype; its values are undefined then.

    In eager mode with an unchanged dtype the tensor stays the same object, which others may hold. A compiled
    program cannot resize its inputs, there a new tensor takes the place.
    """
    buffer: torch.Tensor = getattr(module, name)
    if buffer.dtype == dtype and not torch.compiler.is_compiling():
        buffer.resize_(shape)
    else:
        setattr(module, name, torch.empty(shape, dtype=dtype, device=buffer.device))
