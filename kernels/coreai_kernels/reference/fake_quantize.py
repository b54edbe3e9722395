"""Quantize, dequantize and both at once, with the straight-through gradient's mask."""

import torch
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.reference.bits import pack_mask, unpack_mask
from coreai_kernels.reference.layout import (
    from_memory_order,
    in_format_of,
    in_memory_order,
    memory_order,
    per_block,
)
from coreai_kernels.reference.rounding import round_to_format

__all__ = ["backward", "dequantize", "forward", "quantize"]


def _quotient(
    x: Tensor, scale: Tensor, minval: Tensor | None, block_size: tuple[int, ...], fmt: Format
) -> Tensor:
    """``x`` in units of the scale, in float32; for integers less the offset and rounded."""
    x = x.float()
    if fmt != Format.INT:
        return x / per_block(scale.float(), x, block_size)
    return torch.round((x - _offset(minval, x, block_size)) / per_block(scale.float(), x, block_size))


def _dequantize_values(
    q: Tensor, scale: Tensor, minval: Tensor | None, block_size: tuple[int, ...], fmt: Format
) -> Tensor:
    """Values of quantized ones that the zero point was taken from."""
    y = q * per_block(scale.float(), q, block_size)
    return y + _offset(minval, q, block_size) if fmt == Format.INT else y


def _zero_point(
    zero_point: Tensor | None, minval: Tensor | None, x: Tensor, block_size: tuple[int, ...], quant_min: float
) -> Tensor | float:
    if minval is not None:
        return quant_min
    if zero_point is None:
        return 0.0
    return per_block(zero_point.to(torch.float32), x, block_size)


def _offset(minval: Tensor | None, x: Tensor, block_size: tuple[int, ...]) -> Tensor | float:
    return 0.0 if minval is None else per_block(minval.float(), x, block_size)


def forward(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    format: int,
    quant_min: float,
    quant_max: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Fake-quantized ``input`` (same dtype and memory format), and the packed mask (empty if not wanted)."""
    fmt = Format(format)
    q = _quotient(input, scale, minval, block_size, fmt)
    low: Tensor | float = quant_min
    high: Tensor | float = quant_max
    if fmt == Format.INT:
        # The range moves by the zero point instead of the values: all of it whole numbers, so the results are
        # the same, and kernels save two additions an element.
        zp = _zero_point(zero_point, minval, q, block_size, quant_min)
        low, high = quant_min - zp, quant_max - zp
    inside = (q >= low) & (q <= high)
    q = torch.clamp(q, low, high)  # type: ignore[arg-type]
    q = q if fmt == Format.INT else round_to_format(q, fmt)
    y = _dequantize_values(q, scale, minval, block_size, fmt)
    output = in_format_of(input, y)
    if not with_mask:
        return output, torch.empty(0, dtype=torch.uint8, device=input.device)
    return output, pack_mask(in_memory_order(inside, memory_order(output)))


def backward(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """``grad`` times the mask, in memory order ``order``. A product: NaN and inf behave as IEEE 754 says."""
    flat = in_memory_order(grad, order)
    product = flat.float() * unpack_mask(mask, flat.numel())
    return from_memory_order(product.to(grad.dtype), grad.shape, order)


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    format: int,
    quant_min: float,
    quant_max: float,
    dtype: torch.dtype,
) -> Tensor:
    """Quantized values of ``input`` in ``dtype``, in the input's memory format."""
    fmt = Format(format)
    q = _quotient(input, scale, minval, block_size, fmt)
    if fmt == Format.INT:
        q = (q + _zero_point(zero_point, minval, q, block_size, quant_min)).clamp(quant_min, quant_max)
    else:
        q = round_to_format(q.clamp(quant_min, quant_max), fmt)
    if not dtype.is_floating_point:
        q = q.nan_to_num(nan=0.0)
    return in_format_of(input, q, dtype)


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    format: int,
    quant_min: float,
    dtype: torch.dtype,
) -> Tensor:
    """Values that the quantized ``input`` stands for, in ``dtype`` and the input's memory format."""
    fmt, q = Format(format), input.float()
    if fmt == Format.INT:
        q = q - _zero_point(zero_point, minval, q, block_size, quant_min)
    y = _dequantize_values(q, scale, minval, block_size, fmt)
    return in_format_of(input, y, dtype)
