"""What ``finalize`` writes: compressed models for torch, Core AI, Core ML and ONNX, one module a target.

:func:`save` goes from a model to a file. It loads on first use: compressors use the other modules here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coreai_opt.export.checkpoint_loading import load_checkpoint, load_quantization
    from coreai_opt.export.checkpoints import save_checkpoint
    from coreai_opt.export.saving import SavedModel, save

__all__ = ["SavedModel", "load_checkpoint", "load_quantization", "save", "save_checkpoint"]

_MODULES = {
    "SavedModel": "saving",
    "load_checkpoint": "checkpoint_loading",
    "load_quantization": "checkpoint_loading",
    "save": "saving",
    "save_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
