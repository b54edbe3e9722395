"""Element maths of the Triton kernels: what ``reference/`` says, on registers.

Two things differ under Triton's interpreter, which runs on NumPy: its conversion to bfloat16 truncates, so
the bits are rounded here; its reductions with a combine function call Python once per element, so NumPy's own
are used. On a GPU each is one instruction.
"""

import math

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from coreai_kernels.formats import Format

__all__ = [
    "CORRECTED",
    "EXACT",
    "INTERPRETED",
    "all_of",
    "block_range",
    "decode_fp8",
    "dequantize_value",
    "encode_fp8",
    "fake_quantize_by_division",
    "fake_quantize_by_product",
    "for_products",
    "fp32",
    "fused_multiply_add",
    "has_short_bounds",
    "inside_bits",
    "is_finite",
    "narrow",
    "one_each",
    "quantize_value",
    "round_half_even",
    "round_to",
    "suits_products",
    "wider_range",
]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_NAN_ALL = tl.constexpr(tl.PropagateNan.ALL)
# 2**23: from here on float32 holds integers only.
_ALL_INTEGERS = tl.constexpr(8388608.0)
_SIGN = tl.constexpr(-0x80000000)
# How a quotient by a scale is computed. Corrected products are explained at `_corrected_product`; exact ones
# are for scales that are powers of two, whose reciprocals are numbers.
CORRECTED, EXACT = tl.constexpr(1), tl.constexpr(2)
# Scales from 2**-60 to 2**60 have corrected products, which are as much smaller than the quotient.
_SMALLEST_SCALE = tl.constexpr(2.0**-60)
_LARGEST_SCALE = tl.constexpr(2.0**60)
_UP = tl.constexpr(2.0**64)
_DOWN = tl.constexpr(2.0**-64)
# From here to 2**24 neighbouring float32 numbers are integers one apart: adding this rounds to one of these.
_INTEGERS = tl.constexpr(1.5 * 2.0**23)
_LARGE = tl.constexpr(3.0e38)
# By number of the format; the integers have neither.
_MANTISSA_BITS = tl.constexpr(tuple(fmt.facts.mantissa_bits if fmt else 0 for fmt in Format))
_MIN_EXPONENT = tl.constexpr(tuple(fmt.facts.min_exponent if fmt else 0 for fmt in Format))


@triton.jit
def fp32(x):
    """Exact float32 value of bf16, fp16, fp32; fp64 and integers are rounded."""
    if (
        x.dtype == tl.bfloat16
    ):  # of the upper number in a register one instruction, where a conversion takes two
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
def _round_magnitude(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """``abs(x)`` rounded to ``MANTISSA`` bits, exponents from ``LOWEST``: see ``reference/rounding.py``."""
    MORE: tl.constexpr = (23 - MANTISSA) << 23
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    magic = tl.maximum(exponent + MORE, ((127 + LOWEST) << 23) + MORE).to(tl.float32, bitcast=True)
    return (tl.abs(x) + magic) - magic


@triton.jit
def round_to_grid(x, MANTISSA: tl.constexpr, LOWEST: tl.constexpr):
    """The same with the sign of ``x``. NaN stays NaN."""
    return with_sign(_round_magnitude(x, MANTISSA, LOWEST), x)


@triton.jit
def round_to_format(x, FORMAT: tl.constexpr):
    return round_to_grid(x, _MANTISSA_BITS[FORMAT], _MIN_EXPONENT[FORMAT])


@triton.jit
def fused_multiply_add(a, b, c):
    """``a * b + c`` in float32, rounded once."""
    if INTERPRETED:
        # The product is exact in float64. An inexact sum gets a last bit of 1 there, which the second
        # rounding does not mistake for a tie.
        product = a.to(tl.float64) * b
        addend = c.to(tl.float64)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        inexact = (error != 0) & (tl.abs(total) < float("inf")) & ((bits & 1) == 0)
        toward = tl.where((error > 0) == (total > 0), 1, -1)
        value = tl.where(inexact, bits + toward, bits).to(tl.float64, bitcast=True).to(tl.float32)
    else:
        value = tl.fma(a, b, c)
    return value


@triton.jit
def suits_products(scale, zero_point, low, high, HAS_ZERO_POINT: tl.constexpr):
    """Whether corrected products round and clamp as quotients by ``scale`` do, if :func:`has_short_bounds`.

    The two lie on the same side of every number of up to nine bits: that was seen by trying all mantissas of
    a scale. Rounding and clamping change at such numbers only, if the bounds are among them.
    """
    suits = (scale >= _SMALLEST_SCALE) & (scale <= _LARGEST_SCALE)
    if HAS_ZERO_POINT:
        suits = suits & (tl.maximum(tl.abs(low - zero_point), tl.abs(high - zero_point)) <= 255.0)
    return suits


def has_short_bounds(fmt: int, low: float, high: float) -> bool:
    """Whether the bounds of quantized values are numbers of up to nine bits, and of integers integers."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return False
    if fmt == Format.INT:
        return all(bound == int(bound) and abs(bound) <= 255 for bound in (low, high, high - low))
    return all(math.frexp(bound)[0] * 512 % 1 == 0 for bound in (low, high))


@triton.jit
def _corrected_product(x, scale, reciprocal, FINITE: tl.constexpr):
    """``x / scale``, from the product with the reciprocal and what that leaves over.

    ``scale`` is at least 16: no finite ``x`` overflows. Infinite products leave NaN over; then anything
    positive will do instead, unless all ``x`` are FINITE.
    """
    product = x * reciprocal
    rest = fused_multiply_add(product, scale * -1.0, x)
    if not FINITE:
        if INTERPRETED:  # its minimum lets NaN win
            rest = tl.where(rest != rest, _LARGE, rest)
        else:
            rest = tl.minimum(rest, _LARGE)
    return fused_multiply_add(rest, reciprocal, product)


@triton.jit
def is_equal(a, b):
    """1 where two float32 numbers are equal, else 0, in float32.

    One instruction of NVIDIA's GPUs. LLVM makes vectors of comparisons, whose bits are packed and unpacked.
    """
    if INTERPRETED or not is_cuda():
        one = tl.where(a == b, 1.0, 0.0)
    else:
        one = tl.inline_asm_elementwise(
            "set.eq.f32.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return one


@triton.jit
def for_products(scale, zero_point, low, high, FORMAT: tl.constexpr, QUOTIENT: tl.constexpr):
    """What :func:`fake_quantize_by_product` takes: unit, its reciprocal and the bounds.

    The unit of exact products is the scale; of corrected ones ``scale * 2**64``.
    """
    DOWN: tl.constexpr = 1.0 if QUOTIENT == EXACT else _DOWN
    if QUOTIENT == EXACT:
        unit = scale
    else:
        unit = scale * _UP
    low = (low - zero_point) * DOWN
    high = (high - zero_point) * DOWN
    if FORMAT == 0:
        low = low + _INTEGERS * DOWN
        high = high + _INTEGERS * DOWN
    return unit, tl.math.div_rn(1.0, unit), low, high


@triton.jit
def fake_quantize_by_product(
    x,
    unit,
    reciprocal,
    offset,
    low,
    high,
    FORMAT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    QUOTIENT: tl.constexpr,
    FINITE: tl.constexpr,
):
    """:func:`fake_quantize_by_division` without a division; 1 or 0 in float32 says what lay inside.

    FINITE: all ``x`` are numbers.
    """
    DOWN: tl.constexpr = 1.0 if QUOTIENT == EXACT else _DOWN
    EXPONENT: tl.constexpr = 0 if QUOTIENT == EXACT else -64
    value = x
    if HAS_OFFSET:
        value = x - offset
    if QUOTIENT == EXACT:
        q = value * reciprocal
    else:
        q = _corrected_product(value, unit, reciprocal, FINITE)
    if FORMAT == 0:
        q = q + _INTEGERS * DOWN
    clamped = tl.minimum(tl.maximum(q, low, propagate_nan=_NAN_ALL), high, propagate_nan=_NAN_ALL)
    inside = is_equal(clamped, q)
    if FORMAT == 0:
        y = (clamped - _INTEGERS * DOWN) * unit
        if HAS_OFFSET:
            y = y + offset
    else:
        magnitude = _round_magnitude(clamped, _MANTISSA_BITS[FORMAT], _MIN_EXPONENT[FORMAT] + EXPONENT)
        y = with_sign(magnitude, x) * unit
    return y, inside


@triton.jit
def fake_quantize_by_division(x, scale, zero_point, offset, low, high, FORMAT: tl.constexpr):
    """Float32 ``x`` quantized and dequantized, and whether it lay in ``[low, high]`` before clamping."""
    q, inside = quantize_value(x, scale, zero_point, offset, low, high, FORMAT)
    return dequantize_value(q, scale, zero_point, offset, FORMAT), inside


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
def inside_bits(inside, WHOLE: tl.constexpr):
    """Pack groups of 8 along the last axis: element ``i`` is bit ``i``.

    Of truth values, which need fewer registers; or of ones and zeros in float32, with fewer instructions.
    WHOLE: a thread has groups of these, else maybe halves of groups.
    """
    if inside.dtype == tl.int1:
        bits = tl.sum(tl.where(inside, 1 << tl.arange(0, 8), 0), len(inside.shape) - 1)
    else:
        even, odd = tl.split(tl.reshape(inside, inside.shape[:-1] + [2, 2, 2]))
        even, odd = tl.split(fused_multiply_add(odd, 2.0, even))
        half = fused_multiply_add(odd, 4.0, even)
        if WHOLE:
            first, second = tl.split(half)
            value = fused_multiply_add(second, 16.0, first)
        else:
            value = tl.sum(half * (1.0 + 15.0 * tl.arange(0, 2)), len(half.shape) - 1)
        bits = (value + _ALL_INTEGERS).to(tl.int32, bitcast=True)
    return bits.to(tl.uint8)


@triton.jit
def all_of(true):
    """Whether a whole tensor is true: one answer for all threads."""
    return tl.min(tl.ravel(true.to(tl.int32)), 0) != 0


@triton.jit
def is_finite(low, high):
    """Whether all values of a range are numbers."""
    return (tl.abs(low) < float("inf")) & (tl.abs(high) < float("inf"))


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
def one_each(values):
    """The same values, in a layout that gives a thread as few of them as there can be.

    The compiler else lets every thread compute what follows from a block's range, of all the blocks whose
    elements it has. A gather, here of each value itself, gets a layout of its own.
    """
    index = tl.expand_dims(tl.zeros(values.shape, tl.int32), 0)
    return tl.reshape(tl.gather(tl.expand_dims(values, 0), index, 0), values.shape)


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
