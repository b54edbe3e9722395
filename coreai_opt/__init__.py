"""Model compression for PyTorch training: the API of coreai-opt, on fused kernels.

The subpackages load on first use, so that importing the package alone costs next to nothing.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from coreai_opt import _environment, _plugins
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
    "__fused_version__",
    "__version__",
]

# The release of coreai-opt whose API this is: scripts compare it to know what they may use.
__version__ = "0.4.0"

_SUBPACKAGES = (
    "casting",
    "common",
    "config",
    "controllers",
    "coreai_utils",
    "inspection",
    "palettization",
    "pruning",
    "quantization",
    "search",
)

# Functions, and the modules that have them.
_FUNCTIONS = {
    "load_checkpoint": "checkpoint",
    "palettize": "one_call",
    "prune": "one_call",
    "quantize": "one_call",
    "save_checkpoint": "checkpoint",
}

_environment.warn_of_name_clash()
_environment.check_engine()

if TYPE_CHECKING:
    from coreai_opt.checkpoint import load_checkpoint as load_checkpoint
    from coreai_opt.checkpoint import save_checkpoint as save_checkpoint
    from coreai_opt.one_call import palettize as palettize
    from coreai_opt.one_call import prune as prune
    from coreai_opt.one_call import quantize as quantize

    # The release of this package, coreai-opt-fused.
    __fused_version__: str


def __getattr__(name: str) -> ModuleType | Callable[..., Any] | str:
    if name == "__fused_version__":
        return _environment.own_version()
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        module = importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}")
        function: Callable[..., Any] = getattr(module, name)
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *_FUNCTIONS, "__fused_version__"})


# The last statement: plugins find everything public in place.
_plugins.load_plugins()
