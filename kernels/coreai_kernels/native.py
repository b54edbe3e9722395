"""The native extension, or the reason why it is not there.

Importing this module loads ``coreai_kernels._C``, which registers the C++ kernels with torch's dispatcher,
``_C_cuda.so`` beside a CUDA build of torch, and of autograd's libraries the one that was built for this torch
and this Python.
"""

import ctypes
import importlib
import importlib.machinery
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .libraries import PYTHON, REINSTALL, autograd_library, torch_interface

__all__ = ["Missing", "autograd", "autograd_missing", "cuda_missing", "extension", "missing"]

_FOLDER = Path(__file__).parent


class Missing(NamedTuple):
    """Why a part is not there, and what to do about it."""

    cause: str
    fix: str
    broken: bool = False
    """Present but unusable, rather than left out when the package was built."""

    def __str__(self) -> str:
        return f"{self.cause}. To fix: {self.fix}"


def _report(part: str) -> dict[str, Any] | None:
    """What the build recorded about a part."""
    path = _FOLDER / "_build_report.json"
    return json.loads(path.read_text()).get(part) if path.exists() else None  # type: ignore[no-any-return]


def _reported(part: str) -> Missing:
    """Why there is no file of a part."""
    entry = _report(part)
    if entry is None:
        return Missing("it was never built", REINSTALL)
    if not entry["built"]:
        return Missing(entry["reason"], entry["fix"])
    return Missing("it was built, but its file is gone", REINSTALL, broken=True)


def _load() -> tuple[ModuleType | None, Missing | None]:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((_FOLDER / f"_C{suffix}").exists() for suffix in suffixes):
        others = sorted(path.name for path in _FOLDER.glob("_C.*.so"))
        if others:
            cause = f"it was built for another Python ({', '.join(others)}; this one loads _C{suffixes[0]})"
            return None, Missing(cause, REINSTALL, broken=True)
        return None, _reported("native")
    try:
        module = importlib.import_module("coreai_kernels._C")
    except ImportError as error:
        cause = f"it does not load beside torch {torch.__version__}: {error}"
        return None, Missing(cause, REINSTALL, broken=True)
    # A wrong COREAI_CPU_CAPABILITY is the user's mistake to hear of, not a reason to run something slower.
    module.cpu_capability()
    return module, None


def _load_cuda() -> Missing | None:
    # Not torch.cuda.is_available(): that starts the driver, after which a process cannot fork.
    if torch.version.cuda is None:
        return Missing(f"torch {torch.__version__} is not a CUDA build", "install a CUDA build of torch")
    path = _FOLDER / "_C_cuda.so"
    return _load_library("cuda", path, lambda: torch.ops.load_library(str(path)))[1]


def _capture_cuda() -> None:
    """Let autograd's library capture calls of CUDA tensors."""
    functions = ctypes.CDLL(str(_FOLDER / "_C_cuda.so")).coreai_cuda_capture_functions
    functions.restype = ctypes.c_void_p
    autograd.use_cuda(functions())  # type: ignore[union-attr]


def _load_autograd() -> tuple[ModuleType | None, Missing | None]:
    # It uses what torch may change from version to version: whether another one loads would be no test of it.
    path = _FOLDER / autograd_library(torch.__version__, PYTHON)
    entry = _report("autograd")
    # The report of an earlier version, beside sources that are newer, names no Pythons.
    if not path.exists() and entry and entry["built"] and "python" in entry:
        torches = {torch_interface(version) for version in entry["torch"]}
        if torch_interface(torch.__version__) not in torches or PYTHON not in entry["python"]:
            others = f"torch {', '.join(entry['torch'])} and Python {', '.join(entry['python'])}"
            cause = f"it was built for {others}, and this is torch {torch.__version__} and Python {PYTHON}"
            return None, Missing(cause, REINSTALL)
    return _load_library("autograd", path, lambda: _import_file("coreai_kernels._C_autograd", path))


def _import_file(name: str, path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def _load_library(part: str, path: Path, load: Callable[[], Any]) -> tuple[Any, Missing | None]:
    if not path.exists():
        return None, _reported(part)
    try:
        return load(), None
    except (ImportError, OSError) as error:
        cause = f"it does not load beside torch {torch.__version__}: {error}"
        return None, Missing(cause, REINSTALL, broken=True)


extension, missing = _load()
cuda_missing = _load_cuda()
autograd, autograd_missing = _load_autograd()
if cuda_missing is None and autograd_missing is None:
    _capture_cuda()
