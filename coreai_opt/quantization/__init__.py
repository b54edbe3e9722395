"""Quantization: fewer bits for each value."""

from coreai_opt.quantization.spec import QuantizationSpec

__all__ = ["QuantizationSpec"]
