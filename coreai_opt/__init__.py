"""Model compression for PyTorch training: the API of coreai-opt, on fused kernels.

The subpackages load on first use, so that importing the package alone costs next to nothing.
"""

import importlib
from types import ModuleType

from coreai_opt import _environment
from coreai_opt.common import (
    CompressionType,
    CoreMLExportError,
    DependencyVersionWarning,
    ExportBackend,
    TorchaoTorchIncompatibilityWarning,
    UntestedTorchVersionWarning,
)

__all__ = [
    "CompressionType",
    "CoreMLExportError",
    "DependencyVersionWarning",
    "ExportBackend",
    "TorchaoTorchIncompatibilityWarning",
    "UntestedTorchVersionWarning",
    "__version__",
]

# The release of coreai-opt whose API this is: scripts compare it to know what they may use.
__version__ = "0.3.0"

_SUBPACKAGES = ("common", "config", "pruning", "quantization")

_environment.warn_of_name_clash()


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})
