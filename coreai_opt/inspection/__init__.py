"""What is in a model: its operations as compressors see them, and the bits that its weights take."""

from coreai_opt.inspection.bits_per_weight import BitsPerWeightResult, bits_per_weight
from coreai_opt.inspection.figures import figures, scalars
from coreai_opt.inspection.html_report import report
from coreai_opt.inspection.model_inspector import ModelInspector
from coreai_opt.inspection.types import (
    BoundaryEdge,
    InputEdge,
    ModelSummary,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)

__all__ = [
    "BitsPerWeightResult",
    "BoundaryEdge",
    "InputEdge",
    "ModelInspector",
    "ModelSummary",
    "ModuleContext",
    "ModuleInfo",
    "OpInfo",
    "SourceFrame",
    "bits_per_weight",
    "figures",
    "report",
    "scalars",
]
