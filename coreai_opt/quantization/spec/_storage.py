"""What a quantized tensor takes as it is stored."""

import math
from typing import Any

import torch
from torch import Tensor

from coreai_opt.config.spec.compression_simulator import Storage
from coreai_opt.quantization.spec._numbers import bits_of
from coreai_opt.quantization.spec.qformulation import QuantizationFormulation
from coreai_opt.quantization.spec.qscheme import QuantizationScheme

__all__ = ["storage_of"]


def storage_of(simulator: Any, tensor: Tensor) -> Storage:
    """The values' bits, and those of the parameters, for a fake quantizer."""
    return Storage(float(_bits_of_value(simulator)), _parameter_bits(simulator, tensor), None)


def _bits_of_value(simulator: Any) -> int:
    return simulator.n_bits if simulator.n_bits is not None else bits_of(simulator.dtype)


def _parameter_bits(simulator: Any, tensor: Tensor) -> int:
    """Scales, and zero points or minima, of all blocks."""
    calculator = simulator.qparams_calculator
    scale = getattr(calculator, "scale", None)
    if isinstance(scale, Tensor) and scale.numel():
        blocks = scale.numel()
    else:
        blocks = tensor.numel() // math.prod(simulator.get_block_size(tensor.shape))
    float_bits = torch.finfo(tensor.dtype).bits
    scale_dtype = calculator.scale_dtype
    bits = blocks * (float_bits if scale_dtype is None else bits_of(scale_dtype))
    if scale_dtype == torch.float8_e4m3fn:
        # The scales of blocks are in units of one float32 scale of the tensor.
        bits += 32
    if simulator.qformulation == QuantizationFormulation.MINVAL:
        bits += blocks * float_bits
    elif simulator.qscheme == QuantizationScheme.ASYMMETRIC:
        bits += blocks * _bits_of_value(simulator)
    return bits
