"""Two GPUs in the CPU's memory, for a process of its own: ``emulation/gpu.cpp``, and operators in CUDA C++.

Importing this file makes tensors of the devices ``cuda:0`` and ``cuda:1`` possible in a torch without CUDA.
Torch has to be imported behind it, for it asks for GPUs once; and ``coreai_kernels``, which takes the
operators that are there.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ENVIRONMENT", "capture_calls", "current_device", "device", "exhausted", "heard", "stream"]

# A folder with what `cuda_support.emulated_gpu` builds.
ENVIRONMENT = "COREAI_EMULATED_GPU"

_folder = Path(os.environ[ENVIRONMENT])
_found = importlib.util.find_spec("torch")
assert _found is not None
assert _found.origin is not None
for _name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(Path(_found.origin).parent / "lib" / _name), mode=ctypes.RTLD_GLOBAL)
_gpu = ctypes.CDLL(str(_folder / "gpu.so"), mode=ctypes.RTLD_GLOBAL)
_gpu.gpu_heard.restype = ctypes.c_char_p
_operators = _folder / "operators.so"

import torch  # noqa: E402

torch.ops.load_library(_operators)
torch.cuda._lazy_init = lambda: None


def capture_calls() -> None:
    """What ``coreai_kernels.native`` does beside the real library."""
    from coreai_kernels import native

    functions = ctypes.CDLL(str(_operators)).coreai_cuda_capture_functions
    functions.restype = ctypes.c_void_p
    native.autograd.use_cuda(functions())


def current_device() -> int:
    index: int = _gpu.gpu_exchange_device(0)
    _gpu.gpu_exchange_device(index)
    return index


@contextmanager
def device(index: int) -> Iterator[None]:
    """The current device is this one."""
    before = _gpu.gpu_exchange_device(index)
    try:
        yield
    finally:
        _gpu.gpu_exchange_device(before)


@contextmanager
def stream(index: int, number: int) -> Iterator[None]:
    """The current stream of a device is this one."""
    _gpu.gpu_use_stream(index, ctypes.c_int64(number))
    try:
        yield
    finally:
        _gpu.gpu_use_stream(index, ctypes.c_int64(0))


@contextmanager
def exhausted() -> Iterator[None]:
    """There is no memory left."""
    _gpu.gpu_exhaust(True)
    try:
        yield
    finally:
        _gpu.gpu_exhaust(False)


@contextmanager
def heard() -> Iterator[list[str]]:
    """Of memory, launches and waits, what happens and where: filled when the context ends."""
    found: list[str] = []
    _gpu.gpu_heard()
    _gpu.gpu_listen(True)
    try:
        yield found
    finally:
        _gpu.gpu_listen(False)
    found += _gpu.gpu_heard().decode().splitlines()
