"""Starting kernels: the right device, and no contraction of multiplications and additions."""

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["launch", "multiprocessors"]

# Of the devices that Triton compiles for: NVIDIA's and AMD's, and Intel's.
_GPUS: dict[str, Any] = {"cuda": torch.cuda, "xpu": torch.xpu}


def launch(
    kernel: Any, programs: int | tuple[int, ...], on: Tensor, *args: Any, warps: int, **constants: Any
) -> None:
    """Run ``programs`` programs of ``kernel``, or a grid of them, on the device of ``on``.

    Fused multiply-add is off: ``(q - zero_point) * scale + offset`` rounds twice in the reference.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    gpus = _GPUS.get(on.device.type)
    if gpus is not None and on.device.index != gpus.current_device():
        with gpus.device(on.device):
            kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=False)
        return
    kernel[grid](*args, **constants, num_warps=warps, enable_fp_fusion=False)


def multiprocessors(on: Tensor) -> int:
    """Number of streaming multiprocessors (Intel: Xe cores); that of an H100 where there is no GPU to ask."""
    return _multiprocessors(on.device) if on.device.type in _GPUS else 132


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    properties = _GPUS[device.type].get_device_properties(device.index)
    if device.type == "xpu":
        return int(properties.gpu_subslice_count)
    return int(properties.multi_processor_count)
