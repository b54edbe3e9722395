"""Element maths of the Triton kernels: what ``reference/`` says, on registers.

Two things differ under Triton's interpreter, which runs on NumPy: its conversion to bfloat16 truncates, so
the bits are rounded here; its reductions with a combine function call Python once per element, so NumPy's own
are used. On a GPU each is one instruction.
"""

import triton
import triton.language as tl

from coreai_kernels.formats import Format

__all__ = [
    "INTERPRETED",
    "block_range",
    "decode_fp8",
    "dequantize_value",
    "encode_fp8",
    "fp32",
    "inside_bits",
    "narrow",
    "quantize_value",
    "round_half_even",
    "round_to",
    "wider_range",
]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_NAN_ALL = tl.constexpr(tl.PropagateNan.ALL)
# 2**23: from here on float32 holds integers only.
_ALL_INTEGERS = tl.constexpr(8388608.0)
_SIGN = tl.constexpr(-0x80000000)
# By number of the format; the integers have neither.
_MANTISSA_BITS = tl.constexpr(tuple(fmt.facts.mantissa_bits if fmt else 0 for fmt in Format))
_MIN_EXPONENT = tl.constexpr(tuple(fmt.facts.min_exponent if fmt else 0 for fmt in Format))


@triton.jit
def fp32(x):
    """Exact float32 value of bf16, fp16, fp32; fp64 and integers are rounded."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        value = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 rounded to ``DTYPE``, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, rounded * 0 + 0x7FC0, rounded)
        value = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        value = x.to(DTYPE)
    return value


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 value nearest to ``x`` among those of ``DTYPE``: a chain of operators in that dtype."""
    if tl.float32 == DTYPE or tl.float64 == DTYPE:
        value = x
    else:
        value = fp32(narrow(x, DTYPE))
    return value


@triton.jit
def with_sign(magnitude, x):
    bits = magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & _SIGN)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_half_even(x):
    """Nearest integer by adding and subtracting ``2**23``; keeps signed zeros, infinities and NaN."""
    magnitude = tl.abs(x)
    rounded = (magnitude + _ALL_INTEGERS) - _ALL_INTEGERS
    return with_sign(tl.where(magnitude < _ALL_INTEGERS, rounded, magnitude), x)


@triton.jit
def round_to_grid(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """Round to ``MANTISSA`` bits, exponents from ``LOWEST``: see ``reference/rounding.py``. NaN stays NaN."""
    magnitude = tl.abs(x)
    exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, (127 + LOWEST) << 23)
    magic = (exponent + ((23 - MANTISSA) << 23)).to(tl.float32, bitcast=True)
    return with_sign((magnitude + magic) - magic, x)


@triton.jit
def round_to_format(x, FORMAT: tl.constexpr):
    return round_to_grid(x, _MANTISSA_BITS[FORMAT], _MIN_EXPONENT[FORMAT])


@triton.jit
def quantize_value(x, scale, zero_point, offset, low, high, FORMAT: tl.constexpr):
    """Quantized value, and whether it lay in ``[low, high]`` before clamping.

    ``offset`` may be the constant 0, which costs nothing: ``x - 0`` is ``x`` for every ``x``.
    """
    if FORMAT == 0:
        q = round_half_even(tl.math.div_rn(x - offset, scale)) + zero_point
    else:
        q = tl.math.div_rn(x, scale)
    inside = (q >= low) & (q <= high)
    q = tl.minimum(tl.maximum(q, low, propagate_nan=_NAN_ALL), high, propagate_nan=_NAN_ALL)
    if FORMAT != 0:
        q = round_to_format(q, FORMAT)
    return q, inside


@triton.jit
def dequantize_value(q, scale, zero_point, offset, FORMAT: tl.constexpr):
    """``(q - zero_point) * scale + offset``; adding a zero offset makes ``-0.0`` into ``0.0``, as it must."""
    if FORMAT == 0:
        y = (q - zero_point) * scale + offset
    else:
        y = q * scale
    return y


@triton.jit
def inside_bits(inside):
    """Pack groups of 8 along the last axis: element ``i`` is bit ``i``."""
    weights = tl.arange(0, 8)
    if len(inside.shape) == 2:
        bits = tl.sum(inside.to(tl.int32) << weights[None, :], 1)
    else:
        bits = tl.sum(inside.to(tl.int32) << weights[None, None, :], 2)
    return bits.to(tl.uint8)


@triton.jit
def wider_range(low, high, other_low, other_high):
    """Union of two ranges; NaN wins."""
    if low.dtype == tl.float64:  # PTX has no NaN-propagating minimum in double precision
        new_low = tl.where((low < other_low) | (low != low), low, other_low)
        new_high = tl.where((high > other_high) | (high != high), high, other_high)
    else:
        new_low = tl.minimum(low, other_low, propagate_nan=_NAN_ALL)
        new_high = tl.maximum(high, other_high, propagate_nan=_NAN_ALL)
    return new_low, new_high


@triton.jit
def block_range(low, high, AXIS: tl.constexpr):
    """Minimum of ``low`` and maximum of ``high`` along an axis; NaN wins."""
    if INTERPRETED:
        has_nan = tl.max(((low != low) | (high != high)).to(tl.int32), AXIS)
        new_low = tl.min(tl.where(low != low, 0.0, low), AXIS)
        new_high = tl.max(tl.where(high != high, 0.0, high), AXIS)
        new_low = tl.where(has_nan > 0, float("nan"), new_low)
        new_high = tl.where(has_nan > 0, float("nan"), new_high)
    else:
        new_low, new_high = tl.reduce((low, high), AXIS, wider_range)
    return new_low, new_high


@triton.jit
def decode_fp8(code, E5M2: tl.constexpr):
    """float32 value of a byte: done with shifts because sm_80 has no conversion."""
    code = code.to(tl.int32)
    if E5M2:
        magnitude = ((code & 0x7F) << 21).to(tl.float32, bitcast=True) * 5192296858534827628530496329220096.0
        magnitude = tl.where((code & 0x7F) == 0x7C, float("inf"), magnitude)
        magnitude = tl.where((code & 0x7F) > 0x7C, float("nan"), magnitude)
    else:
        magnitude = ((code & 0x7F) << 20).to(
            tl.float32, bitcast=True
        ) * 1329227995784915872903807060280344576.0
        magnitude = tl.where((code & 0x7F) == 0x7F, float("nan"), magnitude)
    bits = magnitude.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode_fp8(x, E5M2: tl.constexpr):
    """Byte of the nearest fp8 value; beyond the largest, e4m3 has NaN and e5m2 infinity, as torch's cast."""
    MANTISSA: tl.constexpr = 2 if E5M2 else 3
    LOWEST: tl.constexpr = -14 if E5M2 else -6
    STEP: tl.constexpr = 65536.0 if E5M2 else 512.0
    TOO_LARGE: tl.constexpr = 0x7C if E5M2 else 0x7F
    # Clamped first: the magic constant of a huge exponent is no number. 65536 is beyond either format.
    magnitude = tl.abs(round_to_grid(tl.minimum(tl.abs(x), 65536.0), MANTISSA, LOWEST))
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits >> (23 - MANTISSA)) - ((126 + LOWEST) << MANTISSA)
    # Subnormals and zero are multiples of 2**(LOWEST - MANTISSA).
    small = (tl.minimum(magnitude, 1.0) * STEP).to(tl.int32)
    code = tl.where(bits < ((127 + LOWEST) << 23), small, normal)
    code = tl.where(x != x, 0x7F, tl.minimum(code, TOO_LARGE))
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
