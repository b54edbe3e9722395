"""Starting kernels: the right device, and no contraction of multiplications and additions."""

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["launch", "multiprocessors"]


def launch(
    kernel: Any, programs: int | tuple[int, ...], on: Tensor, *args: Any, warps: int, **constants: Any
) -> None:
    """Run ``programs`` programs of ``kernel``, or a grid of them, on the device of ``on``.

    Fused multiply-add is off: ``(q - zero_point) * scale + offset`` rounds twice in the reference.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=False)
        return
    kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=False)


def multiprocessors(on: Tensor) -> int:
    """Number of streaming multiprocessors; that of an H100 where there is no GPU to ask."""
    return _multiprocessors(on.device.index) if on.is_cuda else 132


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
