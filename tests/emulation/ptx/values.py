"""Arithmetic that NumPy has not: fused multiply-add, bfloat16, and the conversions of PTX."""

from typing import Any

import numpy as np

__all__ = ["bfloat16", "compare", "flushed", "fma", "from_bfloat16", "maximum", "minimum", "to_integer"]

Array = np.ndarray[Any, Any]


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there: one that is not exact gets a last bit of
    1, which no later rounding mistakes for a tie.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = np.atleast_1d(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    odd = (bits + np.where(inexact, toward, 0)).view(np.float64)
    return odd.astype(np.float32)


def bfloat16(x: Array) -> Array:
    """Words of the bfloat16 numbers nearest to float32 ones, ties to even; NaN is ``0x7fff``."""
    bits = np.atleast_1d(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(words: Array) -> Array:
    """float32 values of bfloat16 words."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(x: Array) -> Array:
    """float32 values, subnormal ones made into zeros of their sign."""
    small = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(small, np.copysign(np.zeros_like(x), x), x)


def minimum(a: Array, b: Array, nan_wins: bool) -> Array:
    """The smaller one; -0.0 is smaller than 0.0. One NaN loses, or wins."""
    return -maximum(-a, -b, nan_wins)


def maximum(a: Array, b: Array, nan_wins: bool) -> Array:
    """The larger one."""
    larger = np.where((a > b) | ((a == b) & np.signbit(b)), a, b)
    with_nan = np.where(np.isnan(a), b, a)
    unordered = np.isnan(a) | np.isnan(b)
    return np.where(unordered, np.full_like(larger, np.nan) if nan_wins else with_nan, larger)


def to_integer(x: Array, dtype: np.dtype, rounding: str) -> Array:
    """``cvt`` to an integer: beyond its range the nearest one; NaN is 0."""
    rounded = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](
        x.astype(np.float64)
    )
    limits = np.iinfo(dtype)
    if dtype.itemsize == 8:
        raise ValueError("64-bit integers from floating point")
    clamped = np.clip(np.where(np.isnan(rounded), 0, rounded), limits.min, limits.max)
    return clamped.astype(np.int64).astype(dtype)


def compare(name: str, a: Array, b: Array) -> Array | None:
    """A comparison by its name in PTX; None if there is none of that name."""
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(1, bool)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    plain = name[:-1] if name in ("equ", "neu", "ltu", "leu", "gtu", "geu") else name
    if plain in ("lo", "ls", "hi", "hs"):
        plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[plain]
    functions = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    if plain not in functions:
        return None
    result: Array = functions[plain](a, b)
    return result | unordered if plain != name and name.endswith("u") else result & ~unordered
