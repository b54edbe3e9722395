"""From fake quantizers to records of what they quantize to."""

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.export import two_level_scales
from coreai_opt.export.records import Affine, QuantizedActivation, int_min
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase, _DefaultFakeQuantizeImpl
from coreai_opt.quantization.spec.qformulation import QuantizationFormulation

__all__ = ["affine_weight", "is_weight", "quantized_activation"]

# 0.5 in float8_e4m3fn.
_HALF = 0x30
# Values that are packed at a time, so that what lies in between takes little memory.
_PART = 1 << 20


def is_weight(simulator: FakeQuantizeImplBase) -> bool:
    """Whether the simulator serves a parameter or buffer."""
    return simulator.quantization_target is CompressionTargetTensor.WEIGHT


@torch.no_grad()
def affine_weight(simulator: FakeQuantizeImplBase, weight: Tensor, name: str = "weight") -> Affine:
    """What a weight is quantized to.

    Args:
        simulator: has observed the weight.
        weight: the weight, dense.
        name: its qualified name, for messages.

    Raises:
        ValueError: scales of two levels are not what a simulator computes.
    """
    scale, zero_point, minval = simulator.calculate_qparams()
    if _numbers.is_float_format(simulator.dtype):
        return _float_weight(simulator, weight, scale, name)
    scale = scale.to(weight.dtype)
    minval = None if minval is None else minval.to(weight.dtype)
    uses_minval = simulator.qformulation == QuantizationFormulation.MINVAL
    values = simulator.quantize(
        _dense(simulator, weight),
        scale.float(),
        zero_point,
        None if minval is None else minval.float(),
    )
    if uses_minval:
        # The minimum belongs to the smallest integer of the dtype; a clipping scheme begins one above.
        values = values + (int_min(simulator.dtype) - int(simulator.quant_min))
        return Affine(values, scale, None, minval, simulator.dtype, weight.dtype)
    assert zero_point is not None
    return Affine(values, scale, zero_point.to(values.dtype), None, simulator.dtype, weight.dtype)


def _float_weight(simulator: FakeQuantizeImplBase, weight: Tensor, scale: Tensor, name: str) -> Affine:
    scale_dtype = getattr(simulator.qparams_calculator, "scale_dtype", None)
    blocks = of_tensor = None
    if scale_dtype is None:
        scale = scale.to(weight.dtype)
    elif scale_dtype == torch.float8_e4m3fn:
        blocks, of_tensor = two_level_scales.split(scale, name)
        if scale.dtype != torch.float32:
            scale = two_level_scales.joined(blocks, of_tensor)
    values = simulator.quantize(_dense(simulator, weight), scale.float(), None, None)
    if simulator.dtype == _numbers.FLOAT4:
        values = _packed_float4(values)
    if blocks is not None:
        scale = blocks
    elif scale_dtype is not None:
        scale = scale.float().to(scale_dtype)
    return Affine(values, scale, None, None, simulator.dtype, weight.dtype, of_tensor)


def _dense(simulator: FakeQuantizeImplBase, weight: Tensor) -> Tensor:
    """The weight for float32 arithmetic: the engine's is, whatever it gets, without a copy."""
    return weight if isinstance(simulator, _DefaultFakeQuantizeImpl) else weight.float()


def _packed_float4(values: Tensor) -> Tensor:
    """Two values a byte along the last axis, the first in the low half: its sign and the magnitude's code.

    Args:
        values: e2m1 numbers as float8_e4m3fn, which has two more bits of each: an exponent that counts from
            another number, and a one in front of the mantissa that e2m1 lacks for its smallest number, 0.5.
    """
    octets = values.view(torch.uint8).flatten()
    packed = octets.new_empty(octets.numel() // 2)
    for part, place in zip(octets.split(_PART), packed.split(_PART // 2), strict=True):
        magnitudes = part & 0x7F
        codes = ((magnitudes.clamp(min=_HALF) - _HALF) >> 2) + (magnitudes == _HALF)
        place.copy_(coreai_kernels.pack_bits(codes | (part & 0x80) >> 4, 4))
    return packed.reshape(*values.shape[:-1], values.shape[-1] // 2)


@torch.no_grad()
def quantized_activation(simulator: FakeQuantizeImplBase, output_dtype: torch.dtype) -> QuantizedActivation:
    """How an activation is quantized: parameters as a single value, or as one a channel.

    Args:
        simulator: has observed the activation, and has a granularity per tensor or per channel.
        output_dtype: the activation's dtype.
    """
    scale, zero_point, minval = simulator.calculate_qparams()
    axis = None
    if scale.numel() > 1:
        axis = next(i for i, size in enumerate(scale.shape) if size > 1)
    shape = () if axis is None else (-1,)
    is_float = _numbers.is_float_format(simulator.dtype)
    uses_minval = not is_float and simulator.qformulation == QuantizationFormulation.MINVAL
    scale = scale.reshape(shape).to(output_dtype)
    lowest: Tensor | None = None
    highest: Tensor | None = None
    if is_float:
        zero_point = minval = None
        if getattr(simulator.qparams_calculator, "scale_dtype", None) is not None:
            scale = scale.float().to(torch.float8_e8m0fnu)
    elif uses_minval:
        assert minval is not None
        zero_point, minval = None, minval.reshape(shape).to(output_dtype)
        if simulator.quant_min != int_min(simulator.dtype):
            highest = minval + scale * (float(simulator.quant_max) - float(simulator.quant_min))
    else:
        assert zero_point is not None
        zero_point, minval = zero_point.reshape(shape).to(simulator.target_dtype), None
        if simulator.quant_min != int_min(simulator.dtype):
            lowest = scale * (float(simulator.quant_min) - zero_point.to(scale.dtype))
    return QuantizedActivation(
        scale.clone(), zero_point, minval, simulator.dtype, output_dtype, axis, lowest, highest
    )
