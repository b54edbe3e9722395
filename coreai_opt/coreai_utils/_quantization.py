"""The arithmetic of quantized weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from coreai._compiler.ir import (
    Float4E2M1FNType,
    Float8E4M3FNType,
    Float8E5M2Type,
    Float8E8M0FNUType,
    IntegerType,
)
from torch import Tensor

import coreai_kernels
from coreai_kernels import Format, ScaleFormat, Scheme, grid_shape
from coreai_opt.coreai_utils._program import Builder
from coreai_opt.coreai_utils.common import DType, QScheme

__all__ = ["Quantized", "bits_of", "element_type", "quantize", "scaled_symmetric"]

_EPSILON = 1e-6
_FORMATS = {
    DType.FP4_E2M1FN: (Format.E2M1, 6.0, torch.float8_e4m3fn),
    DType.FP8_E4M3FN: (Format.E4M3, 448.0, torch.float8_e4m3fn),
    DType.FP8_E5M2: (Format.E5M2, 57344.0, torch.float8_e5m2),
}


@dataclass(frozen=True)
class Quantized:
    """A quantized weight.

    Attributes:
        data: the quantized values, in a dtype that holds each of them.
        scale: one a block, in the weight's dtype; powers of two in float32 for e8m0.
        zero_point: one a block.
        dtype: what the values are.
        scale_is_power_of_two: whether the scales are stored as e8m0.
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor
    dtype: DType
    scale_is_power_of_two: bool = False

    def build(self, builder: Builder) -> Any:
        """The operations that give the weight back."""
        stored = element_type(self.dtype)
        scale_type = Float8E8M0FNUType.get() if self.scale_is_power_of_two else None
        return builder.shift_scale(
            builder.constant(self.data, stored),
            builder.constant(self.scale, scale_type),
            builder.constant(self.zero_point, stored),
        )


def bits_of(dtype: DType) -> int:
    """Bits of an integer type."""
    return int(dtype.value.removeprefix("u").removeprefix("int"))


def element_type(dtype: DType) -> Any:
    """The MLIR type of stored values."""
    if dtype.is_int():
        unsigned = dtype.value.startswith("u")
        return (IntegerType.get_unsigned if unsigned else IntegerType.get_signed)(bits_of(dtype))
    kinds: dict[DType, Any] = {
        DType.FP4_E2M1FN: Float4E2M1FNType,
        DType.FP8_E4M3FN: Float8E4M3FNType,
        DType.FP8_E5M2: Float8E5M2Type,
    }
    return kinds[dtype].get()


def quantize(
    values: Tensor, dtype: DType, scheme: QScheme, block_size: tuple[int, ...], power_of_two_scale: bool
) -> Quantized:
    """Quantize with one scale and zero point a block.

    Args:
        values: the weight.
        dtype: type of the quantized values.
        scheme: for integers; floats are symmetric.
        block_size: extent of a block along each axis; divides the shape.
        power_of_two_scale: scales that e8m0 holds, by the rule of the OCP microscaling formats.
    """
    low, high = coreai_kernels.observe_range(values, block_size=block_size)
    grid = grid_shape(values.shape, block_size)
    low, high = low.reshape(grid), high.reshape(grid)
    if dtype.is_int():
        return _quantize_to_int(values, dtype, scheme, block_size, low, high)
    fmt, largest, storage = _FORMATS[dtype]
    amax = torch.maximum(-low, high)
    if power_of_two_scale:
        scale, _, _ = coreai_kernels.choose_qparams(
            low,
            high,
            scheme=Scheme.SYMMETRIC,
            quant_min=-largest,
            quant_max=largest,
            format=fmt,
            scale_format=ScaleFormat.E8M0,
        )
    else:
        scale = (2 * amax + _EPSILON) / torch.full_like(amax, 2 * largest)
    data = coreai_kernels.quantize(
        values,
        scale,
        block_size=block_size,
        quant_min=-largest,
        quant_max=largest,
        format=fmt,
        dtype=storage,
    )
    return Quantized(data, scale, torch.zeros(grid, dtype=storage), dtype, power_of_two_scale)


def _quantize_to_int(
    values: Tensor, dtype: DType, scheme: QScheme, block_size: tuple[int, ...], low: Tensor, high: Tensor
) -> Quantized:
    bits, unsigned = bits_of(dtype), dtype.value.startswith("u")
    storage = torch.uint8 if unsigned else torch.int8
    if scheme == QScheme.SYMMETRIC:
        quant_min, quant_max = (0, 2**bits - 2) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        amax = torch.maximum(-low, high)
        scale = (2 * amax + _EPSILON) / torch.full_like(amax, quant_max - quant_min)
        zero_point = torch.full_like(scale, quant_max // 2 if unsigned else 0)
    else:
        quant_min, quant_max = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        low, high = low.clamp(max=0), high.clamp(min=0)
        width = high - low + _EPSILON
        scale = width / torch.full_like(width, quant_max - quant_min)
        zero_point = ((quant_min * high - quant_max * low) / width).round().clamp(quant_min, quant_max)
    data = coreai_kernels.quantize(
        values,
        scale,
        zero_point.to(torch.int32),
        block_size=block_size,
        quant_min=quant_min,
        quant_max=quant_max,
        dtype=storage,
    )
    return Quantized(data, scale, zero_point.to(storage), dtype)


def scaled_symmetric(values: Tensor, dtype: DType) -> Quantized:
    """Quantize a whole tensor, of any shape, with one symmetric scale. Scale and zero point have one axis."""
    flat = values.reshape(-1)
    whole = (max(math.prod(flat.shape), 1),)
    return quantize(flat, dtype, QScheme.SYMMETRIC, whole, power_of_two_scale=False)
