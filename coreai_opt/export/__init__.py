"""What ``finalize`` writes: compressed models for torch, Core AI, Core ML and ONNX, one module a target.

:func:`save` goes from a model to a file. It loads on first use: compressors use the other modules here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coreai_opt.export.saving import SavedModel, save

__all__ = ["SavedModel", "save"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from coreai_opt.export import saving

        return getattr(saving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
