"""Quantization and dequantization in torch operators, differentiable as torch differentiates them.

The fused kernels give the same values without a gradient of their own. These serve who differentiates through
``quantize`` or ``dequantize``, and programs for export, whose readers know torch's operators only.
"""

import torch
from torch import Tensor

from coreai_kernels import Format

__all__ = ["dequantize", "quantize", "round_to_float4"]

_FLOAT8 = {Format.E4M3: torch.float8_e4m3fn, Format.E5M2: torch.float8_e5m2}


def _blocks(tensor: Tensor, block_size: tuple[int, ...]) -> Tensor:
    shape = []
    for size, block in zip(tensor.shape, block_size, strict=True):
        shape += [size // block, block]
    return tensor.reshape(shape)


def _per_block(values: Tensor, grid: tuple[int, ...]) -> Tensor:
    return values.reshape([extent for size in grid for extent in (size, 1)])


def round_to_float4(q: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign, ties to even; NaN stays. Its gradient is zero."""
    magnitude = q.detach().abs()
    # Spacing of the representable values: 0.5 below 2, 1 below 4, then 2.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = ((magnitude / step).round() * step).clamp(max=6.0).copysign(q.detach()).to(q.dtype)
    return torch.where(q.isnan(), q, rounded)


def quantize(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    fmt: Format,
    quant_min: float,
    quant_max: float,
) -> Tensor:
    """Quantized values, at least in float32. ``scale`` and the others have one value per block."""
    grid = tuple(scale.shape)
    x = _blocks(tensor, block_size)
    x = x if x.dtype == torch.float64 else x.float()
    if fmt == Format.INT:
        if minval is not None:
            x = x - _per_block(minval, grid)
        q = torch.round(x / _per_block(scale, grid))
        q = q + (quant_min if zero_point is None else _per_block(zero_point, grid))
        return q.clamp(quant_min, quant_max).reshape(tensor.shape)
    q = (x / _per_block(scale, grid)).clamp(quant_min, quant_max)
    q = round_to_float4(q) if fmt == Format.E2M1 else q.to(_FLOAT8[fmt]).to(q.dtype)
    return q.reshape(tensor.shape)


def dequantize(
    tensor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    fmt: Format,
    quant_min: float,
) -> Tensor:
    """Values that quantized ones stand for, at least in float32."""
    grid = tuple(scale.shape)
    q = _blocks(tensor, block_size)
    q = q if q.dtype == torch.float64 else q.float()
    if fmt != Format.INT:
        return (q * _per_block(scale, grid)).reshape(tensor.shape)
    y = (q - (quant_min if zero_point is None else _per_block(zero_point, grid))) * _per_block(scale, grid)
    # The zero of the zero-point formulation is added as well: it makes -0.0 a zero, as the kernels do.
    return (y + (0.0 if minval is None else _per_block(minval, grid))).reshape(tensor.shape)
