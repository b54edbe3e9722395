"""Sums in float64, which a Mac's GPU does not have."""

import torch
from torch import Tensor

__all__ = ["has_float64", "sum_dtype", "widened"]


def has_float64(device: torch.device) -> bool:
    """Whether tensors on the device can be float64: all but those of Metal."""
    return device.type != "mps"


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type that sums on the device are taken in where float64 serves accuracy only."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(x: Tensor) -> Tensor:
    """The tensor in :func:`sum_dtype` of its device."""
    return x.to(sum_dtype(x.device))
