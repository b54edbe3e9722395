"""What all kinds of compression share."""

from enum import StrEnum, auto
from typing import Any

from coreai_opt._utils.renamed_members import RenamedMembersEnum

__all__ = [
    "CompressionType",
    "CoreMLExportError",
    "DependencyVersionWarning",
    "ExportBackend",
    "TorchaoTorchIncompatibilityWarning",
    "UntestedTorchVersionWarning",
]


class CompressionType(StrEnum):
    """The kinds of compression."""

    QUANTIZATION = auto()
    PALETTIZATION = auto()
    PRUNING = auto()


class ExportBackend(RenamedMembersEnum):
    """What a compressed model is finalized for.

    Members:
        Torch: a torch model with dense weights, whose activations stay simulated.
        CoreML: Core ML.
        CoreAI: Core AI.

    The deprecated names ``MIL`` and ``MLIR`` stand for ``CoreML`` and ``CoreAI``.
    """

    Torch = "torch"
    CoreML = "coreml"
    CoreAI = "coreai"

    @classmethod
    def _renamed(cls) -> dict[str, str]:
        return {"MIL": "CoreML", "MLIR": "CoreAI", "_TORCH": "Torch"}


class DependencyVersionWarning(UserWarning):
    """A dependency has a version that may not do."""


class UntestedTorchVersionWarning(DependencyVersionWarning):
    """torch has a version that was not tested."""


class TorchaoTorchIncompatibilityWarning(DependencyVersionWarning):
    """The versions of torchao and torch do not fit each other."""


class CoreMLExportError(ValueError):
    """Core ML cannot express what a model is compressed with."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @classmethod
    def from_config(cls, config: object, context: str) -> "CoreMLExportError":
        """The error for a configuration; ``context`` says where in the model."""
        return cls(f"{context}: Core ML has no equivalent of {type(config).__name__}")

    @classmethod
    def from_dtype(cls, dtype: Any, context: str) -> "CoreMLExportError":
        """The error for a dtype; ``context`` says where in the model."""
        return cls(f"{context}: Core ML has no equivalent of the dtype {dtype}")
