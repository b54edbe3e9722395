"""Magnitudes as integers: the order that all masks rank elements in."""

import torch
from torch import Tensor

__all__ = ["magnitude_keys"]

_INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def magnitude_keys(x: Tensor) -> Tensor:
    """Non-negative integers that compare as ``|x|`` does: the bits without the sign.

    Subnormals are told apart, ``-0.0`` equals ``0.0``, and all NaNs are equal and rank above infinity.
    """
    bits = x.view(_INTEGERS[x.dtype])
    largest = torch.iinfo(bits.dtype).max
    return (bits & largest).masked_fill(x.isnan(), largest)
