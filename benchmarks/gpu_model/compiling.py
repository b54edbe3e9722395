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
        arch: of the GPU, 90 for sm_90.
    """

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        """The target that is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own: kernels are cached beside those of real devices."""
        return 1000 + self.target.arch  # type: ignore[no-any-return]

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
