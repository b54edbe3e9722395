"""The table of number formats (``coreai_kernels.formats``) by torch's dtypes."""

import re

import torch

from coreai_kernels import Format, ScaleFormat
from coreai_kernels.formats import NUMBER_FORMATS, SCALE_FORMATS, NumberFormat

__all__ = [
    "FLOAT4",
    "SCALE_DTYPES",
    "SUPPORTED_DTYPES",
    "bits_of",
    "check_range",
    "format_of",
    "is_float_format",
    "range_of",
    "scale_format_of",
    "storage_dtype_of",
]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


FLOAT4 = torch.float4_e2m1fn_x2

_NUMBER_FORMATS: dict[torch.dtype, NumberFormat] = {_dtype(name): row for name, row in NUMBER_FORMATS.items()}
_SCALE_FORMATS = {_dtype(facts.dtype): kind for kind, facts in SCALE_FORMATS.items() if facts.dtype}

SUPPORTED_DTYPES = tuple(_NUMBER_FORMATS)

# Dtypes that scales can be rounded to, each with the dtypes whose values may have such scales.
SCALE_DTYPES: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    dtype: tuple(map(_dtype, kind.facts.number_formats)) for dtype, kind in _SCALE_FORMATS.items()
}


def scale_format_of(dtype: torch.dtype | None) -> ScaleFormat:
    """The engine's name for scales of ``dtype``; None is float32.

    Raises:
        KeyError: scales cannot be of that dtype.
    """
    return ScaleFormat.FLOAT32 if dtype is None else _SCALE_FORMATS[dtype]


def format_of(dtype: torch.dtype) -> Format:
    """The engine's name for the values of ``dtype``."""
    row = _NUMBER_FORMATS.get(dtype)
    return Format.INT if row is None else row.format


def is_float_format(dtype: torch.dtype) -> bool:
    """Whether quantized values are floating-point numbers."""
    return format_of(dtype) != Format.INT


def bits_of(dtype: torch.dtype) -> int:
    """Bits of one value of ``dtype``; RuntimeError if its name does not say."""
    found = re.search(r"(?:int|float)(\d+)", str(dtype))
    if found is None:
        raise RuntimeError(f"Unable to extract number of bits from dtype {dtype}")
    return int(found[1])


def storage_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds quantized values of ``dtype`` one by one."""
    row = _NUMBER_FORMATS.get(dtype)
    if row is not None:
        return _dtype(row.storage)
    if bits_of(dtype) >= 8 or dtype.is_floating_point:
        return dtype
    return torch.uint8 if str(dtype).startswith("torch.uint") else torch.int8


def range_of(dtype: torch.dtype, clipped: bool) -> tuple[int | float, int | float]:
    """The smallest and the largest quantized value; ``clipped``: signed integers lose their smallest."""
    row = _NUMBER_FORMATS.get(dtype)
    if row is not None:
        is_signed = row.format == Format.INT and row.quant_min < 0
        return row.quant_min + (is_signed and clipped), row.quant_max
    bits = bits_of(dtype)
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        return limits.min, limits.max
    if str(dtype).startswith("torch.uint"):
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + clipped, 2 ** (bits - 1) - 1


def check_range(dtype: torch.dtype, quant_min: float, quant_max: float) -> None:
    """Raise ValueError if what holds a quantized value of ``dtype`` does not hold integers of that range."""
    storage = storage_dtype_of(dtype)
    if storage.is_floating_point or is_float_format(dtype):
        return
    limits = torch.iinfo(storage)
    if not limits.min <= quant_min <= quant_max <= limits.max:
        raise ValueError(
            f"quant_min and quant_max of {dtype} must be from {limits.min} to {limits.max}, in that order; "
            f"got {quant_min} and {quant_max}"
        )
