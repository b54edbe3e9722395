"""The native extension, or the reason why it is not there.

Importing this module loads ``coreai_kernels._C``, which registers the C++ kernels with torch's dispatcher,
and ``_C_cuda.so`` beside a CUDA build of torch.
"""

import importlib
import importlib.machinery
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = ["Missing", "cuda_missing", "extension", "missing"]

_FOLDER = Path(__file__).parent
_REINSTALL = "pip install . --no-build-isolation --force-reinstall --no-deps"


class Missing(NamedTuple):
    """Why a part is not there, and what to do about it."""

    cause: str
    fix: str
    broken: bool = False
    """Present but unusable, rather than left out when the package was built."""

    def __str__(self) -> str:
        return f"{self.cause}. To fix: {self.fix}"


def _reported(part: str) -> Missing:
    """What the build recorded about a part that it did not make."""
    path = _FOLDER / "_build_report.json"
    if not path.exists():
        return Missing("it was never built", _REINSTALL)
    entry = json.loads(path.read_text())[part]
    if not entry["built"]:
        return Missing(entry["reason"], entry["fix"])
    return Missing("it was built, but its file is gone", _REINSTALL, broken=True)


def _load() -> tuple[ModuleType | None, Missing | None]:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((_FOLDER / f"_C{suffix}").exists() for suffix in suffixes):
        others = sorted(path.name for path in _FOLDER.glob("_C.*.so"))
        if others:
            cause = f"it was built for another Python ({', '.join(others)}; this one loads _C{suffixes[0]})"
            return None, Missing(cause, _REINSTALL, broken=True)
        return None, _reported("native")
    try:
        module = importlib.import_module("coreai_kernels._C")
    except ImportError as error:
        cause = f"it does not load beside torch {torch.__version__}: {error}"
        return None, Missing(cause, _REINSTALL, broken=True)
    # A wrong COREAI_CPU_CAPABILITY is the user's mistake to hear of, not a reason to run something slower.
    module.cpu_capability()
    return module, None


def _load_cuda() -> Missing | None:
    # Not torch.cuda.is_available(): that starts the driver, after which a process cannot fork.
    if torch.version.cuda is None:
        return Missing(f"torch {torch.__version__} is not a CUDA build", "install a CUDA build of torch")
    path = _FOLDER / "_C_cuda.so"
    if not path.exists():
        return _reported("cuda")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Missing(f"it does not load beside torch {torch.__version__}: {error}", _REINSTALL, broken=True)
    return None


extension, missing = _load()
cuda_missing = _load_cuda()
