"""Operators of the Triton backend on CPU tensors: compiled for a GPU, and their PTX interpreted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu_model.compiling import NamedTarget
from tests.emulation.ptx import launch

__all__ = ["interpreted"]

_SCALARS = {"i1": np.int8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "u32": np.uint32, "i64": np.int64}
_SCALARS |= {"u64": np.uint64, "fp32": np.float32, "fp64": np.float64}


class _Target(NamedTarget):
    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _flat(value: Any, kind: Any) -> list[Any]:
    """An argument as the parameters have it: tuples flat, without what is compiled in."""
    if isinstance(kind, (tuple, list)):
        return [each for one, its in zip(value, kind, strict=True) for each in _flat(one, its)]
    if kind == "constexpr":
        return []
    if isinstance(value, Tensor):
        return [value]
    return [_SCALARS[kind](value)]


@contextmanager
def interpreted(arch: int, *, reverse: bool = False, reachable: Sequence[Tensor] = ()) -> Iterator[list[str]]:
    """Launches of Triton kernels within compile them for sm_``arch`` and interpret them.

    Args:
        arch: 90 for sm_90.
        reverse: start with the last block of each grid.
        reachable: tensors that kernels find the addresses of in memory.

    Yields:
        The names of the kernels, as they are launched.
    """
    run = JITFunction.run
    names: list[str] = []

    def interpret(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments: list[Any] = []
        for name, kind in kernel.src.signature.items():
            arguments += _flat(given[name], kind)
        # Two pointers to scratch memory, which these kernels do not use.
        arguments += [None, None]
        names.append(self.__name__.removeprefix("_"))
        launch(
            kernel.asm["ptx"],
            tuple(grid),
            32 * kernel.metadata.num_warps,
            arguments,
            shared=kernel.metadata.shared,
            reverse=reverse,
            reachable=reachable,
        )
        return kernel

    with (
        mock.patch.object(JITFunction, "run", interpret),
        mock.patch.object(driver, "_active", _Target(arch)),
    ):
        yield names
