"""Sums in float64, which a Mac's GPU and some of Intel's do not have."""

import functools

import torch
from torch import Tensor

__all__ = ["has_float64", "sum_dtype", "widened"]


def has_float64(device: torch.device) -> bool:
    """Whether tensors on the device can be float64: not those of Metal, nor of every Intel GPU."""
    if device.type == "xpu":
        return _has_float64(device.index)
    return device.type != "mps"


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type that sums on the device are taken in where float64 serves accuracy only."""
    return torch.float64 if has_float64(device) else torch.float32


def widened(x: Tensor) -> Tensor:
    """The tensor in :func:`sum_dtype` of its device."""
    return x.to(sum_dtype(x.device))


@functools.cache
def _has_float64(index: int | None) -> bool:
    return bool(torch.xpu.get_device_properties(index).has_fp64)
