"""``choose_qparams``, and the step from a batch's range to parameters that the observing kernels share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat, largest_exponent
from coreai_kernels.quant_config import QuantConfig
from coreai_kernels.reference.qparams import tensor_scale
from coreai_kernels.triton.elementwise import (
    fp32,
    has_short_bounds,
    narrow,
    round_half_even,
    round_to,
    round_to_format,
    wider_range,
)
from coreai_kernels.triton.launch import launch
from coreai_kernels.types import Scheme

__all__ = ["Constants", "choose_qparams", "constants_of", "finish", "numbers_of", "tl_dtype"]

_SMALLEST_SCALE = tl.constexpr(ScaleFormat.FLOAT32.facts.smallest)
_SMALLEST_E8M0 = tl.constexpr(ScaleFormat.E8M0.facts.smallest)
_E8M0 = tl.constexpr(int(ScaleFormat.E8M0))
_E4M3 = tl.constexpr(int(ScaleFormat.E4M3))
_SMALLEST_E4M3 = tl.constexpr(ScaleFormat.E4M3.facts.smallest)
_LARGEST_E4M3 = tl.constexpr(Format.E4M3.facts.largest)
_E4M3_VALUES = tl.constexpr(int(Format.E4M3))
_INT32_MIN = tl.constexpr(-(2**31))
_NAN_ALL = tl.constexpr(tl.PropagateNan.ALL)

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def with_zero(low, high):
    """The range widened to hold zero; zeros are positive."""
    zero = tl.zeros_like(low)
    low, high = wider_range(low, high, zero, zero)
    return low + 0.0, high + 0.0


@triton.jit
def choose(low, high, numbers, CONFIG: tl.constexpr, ROUND: tl.constexpr):
    """Scale, zero point (int32) and minimum of float32 ranges; the arithmetic rounds to ``ROUND``."""
    quant_min = numbers[0]
    quant_max = numbers[1]
    divisor = numbers[2]
    low, high = with_zero(low, high)
    amax = tl.maximum(-low, high, propagate_nan=_NAN_ALL)
    zero_point = tl.zeros_like(low).to(tl.int32)
    minval = tl.zeros_like(low)
    if CONFIG.scale_format == _E8M0:
        exponent = ((amax.to(tl.int32, bitcast=True) >> 23) & 0xFF) - (127 + CONFIG.largest_exponent)
        biased = tl.minimum(tl.maximum(exponent, -127), 128) + 127
        scale = tl.maximum((biased << 23).to(tl.float32, bitcast=True), _SMALLEST_E8M0)
        if CONFIG.format == 0:
            minval = amax * -1.0  # a minus sign would be 0 - amax, and lose that of zero
    elif CONFIG.format == 0 and CONFIG.asymmetric:
        scale = round_to(tl.math.div_rn(round_to(high - low, ROUND), divisor), ROUND)
        scale = tl.maximum(scale, _SMALLEST_SCALE, propagate_nan=_NAN_ALL)
        steps = round_half_even(round_to(tl.math.div_rn(low, scale), ROUND))
        position = round_to(quant_min - steps, ROUND)
        position = tl.minimum(tl.maximum(position, quant_min), quant_max)
        # A NaN that reached the scale has no integer; the smallest one is what x86 makes of it.
        unknown = steps != steps
        zero_point = tl.where(unknown, _INT32_MIN, tl.where(unknown, 0.0, position).to(tl.int32))
        minval = low
    else:
        scale = round_to(tl.math.div_rn(amax, divisor), ROUND)
        scale = tl.maximum(scale, _SMALLEST_SCALE, propagate_nan=_NAN_ALL)
        if CONFIG.format == 0:
            zero_point = tl.zeros_like(zero_point) + numbers[3]
            minval = amax * -1.0
    return scale, zero_point, minval


@triton.jit
def two_level_scale(low, high, numbers, of_tensor):
    """An e4m3 number times the scale of the tensor."""
    low, high = with_zero(low, high)
    amax = tl.maximum(-low, high, propagate_nan=_NAN_ALL)
    of_block = tl.math.div_rn(tl.math.div_rn(amax, numbers[1]), of_tensor)
    of_block = tl.maximum(of_block, _SMALLEST_E4M3, propagate_nan=_NAN_ALL)
    of_block = tl.minimum(of_block, _LARGEST_E4M3, propagate_nan=_NAN_ALL)
    return round_to_format(of_block, _E4M3_VALUES) * of_tensor


@triton.jit
def next_range(low, high, old_min, old_max, index, valid, numbers, UPDATE: tl.constexpr, DTYPE: tl.constexpr):
    """The range that follows the batch's float32 ``low`` and ``high``; every value is one of ``DTYPE``."""
    low, high = with_zero(low, high)
    if numbers[6] is not None:
        low = round_to(tl.zeros_like(low) + numbers[6], DTYPE)
    if numbers[7] is not None:
        high = round_to(tl.zeros_like(high) + numbers[7], DTYPE)
    if UPDATE != 0 and old_min is not None:
        old_low = tl.load(old_min + index, mask=valid)
        old_high = tl.load(old_max + index, mask=valid)
        # Threads that hold the same block read the old range before one of them writes the new one.
        tl.debug_barrier()
        if UPDATE == 1:
            low = average(low, old_low, numbers, DTYPE)
            high = average(high, old_high, numbers, DTYPE)
        elif tl.float64 == DTYPE:
            low, high = wider_range(
                low.to(tl.float64), high.to(tl.float64), old_low.to(tl.float64), old_high.to(tl.float64)
            )
        else:
            low, high = wider_range(
                low, high, round_to(fp32(old_low), DTYPE), round_to(fp32(old_high), DTYPE)
            )
    return low, high


@triton.jit
def average(batch, old, numbers, DTYPE: tl.constexpr):
    new_part = round_to(fp32(batch) * numbers[4], DTYPE)
    old_part = round_to(round_to(fp32(old), DTYPE) * numbers[5], DTYPE)
    return round_to(new_part + old_part, DTYPE)


@triton.jit
def finish(low, high, index, valid, owned, state, numbers, CONFIG: tl.constexpr, DTYPE: tl.constexpr):
    """What becomes of the ranges of the blocks ``index``.

    Without ``CONFIG`` the ranges themselves are stored. With it, the running range and the parameters are
    brought up to date and stored where ``state`` has a place; scale, zero point and minimum are returned.

    Args:
        low: minima, in float32.
        high: maxima.
        index: position in the parameters.
        valid: which of them exist.
        owned: which of them this program has to store.
        state: pointers or None: old minimum and maximum; scale, zero point, minimum, new minimum and maximum.
        numbers: as :func:`numbers_of` makes them.
        CONFIG: as :func:`constants_of` makes them.
        DTYPE: the input's dtype.
    """
    if CONFIG is None:
        scale = low + 0.0
        zero_point = high + 0.0
        minval = low
        tl.store(state[5] + index, narrow(scale, DTYPE), mask=owned)
        tl.store(state[6] + index, narrow(zero_point, DTYPE), mask=owned)
    else:
        low, high = next_range(low, high, state[0], state[1], index, valid, numbers, CONFIG.update, DTYPE)
        scale, zero_point, minval = choose(fp32(low), fp32(high), numbers, CONFIG, DTYPE)
        if state[2] is not None:
            tl.store(state[2] + index, scale, mask=owned)
        if state[3] is not None:
            tl.store(state[3] + index, zero_point, mask=owned)
        if state[4] is not None:
            tl.store(state[4] + index, minval, mask=owned)
        if state[5] is not None:
            tl.store(state[5] + index, narrow(low, DTYPE), mask=owned)
        if state[6] is not None:
            tl.store(state[6] + index, narrow(high, DTYPE), mask=owned)
    return scale, zero_point, minval


@triton.jit
def _choose(
    min_val,
    max_val,
    scale_out,
    zero_point_out,
    minval_out,
    tensor_scale,
    numel,
    numbers,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = index < numel
    low = fp32(tl.load(min_val + index, mask=valid, other=0.0))
    high = fp32(tl.load(max_val + index, mask=valid, other=0.0))
    if CONFIG.scale_format == _E4M3:
        scale = two_level_scale(low, high, numbers, tl.load(tensor_scale))
        zero_point = tl.zeros_like(low).to(tl.int32)
        minval = tl.zeros_like(low)
    else:
        scale, zero_point, minval = choose(low, high, numbers, CONFIG, DTYPE)
    tl.store(scale_out + index, scale, mask=valid)
    tl.store(zero_point_out + index, zero_point, mask=valid)
    tl.store(minval_out + index, minval, mask=valid)


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a floating-point dtype."""
    return _TL_DTYPES[dtype]


class Constants(NamedTuple):
    """What a kernel is compiled for: codes of :class:`QuantConfig`'s kinds, and what follows from them."""

    format: int
    asymmetric: bool
    use_minval: bool
    scale_format: int
    largest_exponent: int
    update: int
    short_bounds: bool


def constants_of(config: QuantConfig) -> Constants:
    """The constants of a step."""
    is_e8m0 = config.scale_format == ScaleFormat.E8M0
    return Constants(
        format=int(config.format),
        asymmetric=config.scheme == Scheme.ASYMMETRIC,
        use_minval=bool(config.use_minval),
        scale_format=int(config.scale_format),
        largest_exponent=largest_exponent(config.format, config.quant_max) if is_e8m0 else 0,
        update=int(config.update),
        short_bounds=has_short_bounds(config.format, config.quant_min, config.quant_max),
    )


def numbers_of(config: QuantConfig) -> tuple[float | int | None, ...]:
    """Scalars of a step: bounds, divisor, symmetric zero point, shares of the average, fixed range."""
    quant_min, quant_max = float(config.quant_min), float(config.quant_max)
    divisor = quant_max - quant_min
    if config.format != Format.INT or config.scheme != Scheme.ASYMMETRIC:
        divisor /= 2
    return (
        quant_min,
        quant_max,
        divisor,
        int((quant_min + quant_max + 1) / 2),
        float(config.averaging_constant),
        1.0 - config.averaging_constant,
        None if config.range_min is None else float(config.range_min),
        None if config.range_max is None else float(config.range_max),
    )


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    scheme: int,
    format: int,
    quant_min: float,
    quant_max: float,
    scale_format: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference/qparams.py``."""
    scale = torch.empty(min_val.shape, dtype=torch.float32, device=min_val.device)
    zero_point, minval = torch.empty_like(scale, dtype=torch.int32), torch.empty_like(scale)
    numel = scale.numel()
    config = QuantConfig((), scheme, format, quant_min, quant_max, scale_format=scale_format)
    of_tensor = tensor_scale(min_val, max_val, quant_max) if scale_format == ScaleFormat.E4M3 else None
    if numel:
        launch(
            _choose,
            triton.cdiv(numel, 256),
            scale,
            min_val.contiguous(),
            max_val.contiguous(),
            scale,
            zero_point,
            minval,
            of_tensor,
            numel,
            numbers_of(config),
            CONFIG=constants_of(config),
            DTYPE=tl_dtype(torch.promote_types(min_val.dtype, max_val.dtype)),
            TILE=256,
            warps=4,
        )
    return scale, zero_point, minval
