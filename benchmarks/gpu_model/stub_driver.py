"""A driver for Triton whose launches do nothing, on a machine without a GPU.

Triton's own launcher, in C, calls a ``libcuda`` that is made here, in which all functions say that they
succeeded. Kernels are compiled for sm_90.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["build_libcuda", "environment", "install", "operators_of_cuda_on_the_cpu"]

_SOURCE = """
typedef unsigned long long Pointer;
#define DOES_NOTHING(name) int name() { return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { *value = 1 << 17; return 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { *value = 1024; return 0; }
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuModuleLoadData(void** module, const void* image) { *module = (void*)1; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = (void*)1; return 0; }
int cuPointerGetAttribute(Pointer* found, int attribute, Pointer pointer) { *found = pointer; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "none"; return 0; }
DOES_NOTHING(cuDevicePrimaryCtxRetain)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuDriverGetVersion)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuOccupancyMaxActiveClusters)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col)
DOES_NOTHING(cuLaunchKernelEx)
"""


def build_libcuda(folder: Path) -> None:
    """Compile the library into a folder.

    Raises:
        RuntimeError: there is no C compiler, or it fails; the text has its output.
    """
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise RuntimeError("no C compiler was found (Debian: apt install gcc)")
    source = folder / "libcuda.c"
    source.write_text(_SOURCE)
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{compiler} failed: {done.stderr[-3000:]}")


def environment(folder: Path) -> dict[str, str]:
    """What a process needs to load that library; kernels are cached in the folder, too."""
    paths = filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }


def install() -> None:
    """Have Triton launch by it, from here on."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Driver(CudaDriver):  # type: ignore[misc]
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    stub = Driver()
    stub.get_current_device = lambda: 0
    stub.get_current_stream = lambda device: 0
    driver.set_active(stub)


def operators_of_cuda_on_the_cpu() -> None:
    """Register what is meant for CUDA tensors for the CPU's; before ``coreai_kernels`` is imported."""
    register: Callable[..., Any] = torch.library.Library.impl

    def impl(self: torch.library.Library, name: Any, function: Any, key: str = "", **more: Any) -> Any:
        if self.ns != "coreai_kernels" or key not in ("CPU", "CUDA"):
            return register(self, name, function, key, **more)
        return register(self, name, function, "CPU", **more) if key == "CUDA" else None

    torch.library.Library.impl = impl  # type: ignore[method-assign]
