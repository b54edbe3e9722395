"""Triton kernels compiled ahead of time for three GPU generations: how, and what to expect of the result.

The operators run on meta tensors, with Triton's driver replaced by one that only names a target: what is
compiled is exactly what a launch on a GPU would compile (constants, specialization of arguments, warps).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu_model.compiling import NamedTarget
from benchmarks.gpu_model.machine_code import resources
from coreai_kernels import Format

__all__ = [
    "ARCHITECTURES",
    "BF16",
    "BLOCKS",
    "FORMATS",
    "FP16",
    "FP32",
    "Variant",
    "check",
    "compile_only",
    "meta",
    "parameters",
    "short",
]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

ARCHITECTURES = pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)

# A load or store of 16 bytes or more a thread, in the spellings of the PTX versions.
WIDE_LOAD = re.compile(r"ld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)")
WIDE_STORE = re.compile(r"st\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)")


def compile_only(arch: int | str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Have launches compile for an architecture and do no more; names and results, as they come."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__.removeprefix("_"), kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_kernel)
    monkeypatch.setattr(driver, "_active", NamedTarget(arch))
    return found


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Variant:
    """An operator on certain tensors, and what is expected of it.

    Attributes:
        name: for the test's id.
        run: calls the operator.
        kernels: what it launches, in order.
        wide_loads: the first kernel reads 16 bytes a thread.
        wide_stores: the last kernel writes 16 bytes a thread.
        divides: the last kernel has an IEEE division.
        exact: every division is one, and nothing is contracted or flushed to zero.
    """

    name: str
    run: Callable[[], Any]
    kernels: tuple[str, ...]
    wide_loads: bool = True
    wide_stores: bool = True
    divides: bool = True
    exact: bool = True


BLOCKS = {
    "tensor": (1024, 4096),
    "rows": (1, 4096),
    "columns": (1024, 1),
    "runs_32": (1, 32),
    "columns_of_32": (32, 1),
    "blocks_2d": (32, 32),
}
FORMATS = {
    "int4": (Format.INT, -8.0, 7.0),
    "uint8": (Format.INT, 0.0, 255.0),
    "e4m3": (Format.E4M3, -448.0, 448.0),
    "e5m2": (Format.E5M2, -57344.0, 57344.0),
    "e2m1": (Format.E2M1, -6.0, 6.0),
}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parameters(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    grid = [size // part for size, part in zip(shape, block, strict=True)]
    return meta(*grid), meta(*grid, dtype=torch.int32), meta(*grid)


def check(variant: Variant, compiled: list[tuple[str, Any]], folder: Path) -> None:
    """Exact arithmetic, everything in registers, wide loads and stores where expected."""
    variant.run()
    assert tuple(name for name, _ in compiled) == variant.kernels
    for _, kernel in compiled:
        assert kernel.metadata.enable_fp_fusion is False
        ptx = kernel.asm["ptx"]
        assert ".local" not in ptx
        used = resources(kernel.asm["cubin"], folder)
        assert (used["STACK"], used["LOCAL"]) == (0, 0), used
        if variant.exact:
            for inexact in ("div.full", "div.approx", "rcp.approx", ".ftz"):
                assert inexact not in ptx
            # Without a rounding of their own the assembler may contract them.
            assert not re.search(r"\b(add|sub|mul)(\.ftz)?\.f32(x2)?\b", ptx)
    first, last = compiled[0][1].asm["ptx"], compiled[-1][1].asm["ptx"]
    assert not variant.wide_loads or WIDE_LOAD.search(first)
    assert not variant.wide_stores or WIDE_STORE.search(last)
    assert not variant.divides or "div.rn.f32" in last
