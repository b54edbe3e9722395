"""Quantization: fewer bits for each value."""

from coreai_opt.quantization.config import (
    ExecutionMode,
    InvalidExecutionModeError,
    ModuleQuantizerConfig,
    QuantizerConfig,
)
from coreai_opt.quantization.quantizer import Quantizer
from coreai_opt.quantization.spec import QuantizationSpec

__all__ = [
    "ExecutionMode",
    "InvalidExecutionModeError",
    "ModuleQuantizerConfig",
    "QuantizationSpec",
    "Quantizer",
    "QuantizerConfig",
]
