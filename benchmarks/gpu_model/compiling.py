"""Kernels as a launch on a GPU would compile them, without one.

The operators run on meta tensors, with Triton's driver replaced by one that only names a target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["Launch", "NamedTarget", "launches"]


class NamedTarget:
    """A Triton driver without a device.

    Args:
        arch: of the GPU, 90 for NVIDIA's sm_90; of AMD's data centre GPUs as LLVM names it, such as gfx942.
    """

    def __init__(self, arch: int | str) -> None:
        # AMD's data centre GPUs have 64 threads in a warp.
        self.target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        """The target that is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own: kernels are cached beside those of real devices."""
        arch = self.target.arch
        return 1000 + arch if isinstance(arch, int) else 2000 + int(arch.removeprefix("gfx"), 16)

    def get_current_stream(self, device: int | None = None) -> int:
        """No stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Tensors without data."""
        return torch.device("meta")


@dataclass(frozen=True)
class Launch:
    """A kernel that would be launched.

    Attributes:
        name: of the kernel.
        cubin: its machine code.
        threads: of all blocks together.
        threads_in_block: of one.
    """

    name: str
    cubin: bytes
    threads: int
    threads_in_block: int


@contextmanager
def _recorded(arch: int, found: list[Launch]) -> Iterator[None]:
    run = JITFunction.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        in_block = 32 * kernel.metadata.num_warps
        blocks = 1
        for extent in grid:
            blocks *= int(extent)
        name = self.__name__.removeprefix("_")
        found.append(Launch(name, kernel.asm["cubin"], blocks * in_block, in_block))
        return kernel

    with mock.patch.object(JITFunction, "run", compile_kernel):
        before = driver._active
        driver._active = NamedTarget(arch)
        try:
            yield
        finally:
            driver._active = before


def launches(arch: int, operator: Callable[[], Any]) -> list[Launch]:
    """What an operator on meta tensors would launch on a GPU of that architecture."""
    found: list[Launch] = []
    with _recorded(arch, found):
        operator()
    return found
