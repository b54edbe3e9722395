"""Facts about the dtypes that quantization knows."""

import re

import torch

from coreai_kernels import Format

__all__ = ["bits_of", "format_of", "is_float_format", "storage_dtype_of"]

FLOAT4 = torch.float4_e2m1fn_x2

_FLOAT_FORMATS = {
    torch.float8_e4m3fn: Format.E4M3,
    torch.float8_e5m2: Format.E5M2,
    FLOAT4: Format.E2M1,
}

INT_DTYPES = (
    torch.int2,  # type: ignore[attr-defined]
    torch.int3,  # type: ignore[attr-defined]
    torch.int4,  # type: ignore[attr-defined]
    torch.int5,  # type: ignore[attr-defined]
    torch.int6,  # type: ignore[attr-defined]
    torch.int7,  # type: ignore[attr-defined]
    torch.int8,
    torch.uint2,  # type: ignore[attr-defined]
    torch.uint4,  # type: ignore[attr-defined]
    torch.uint6,  # type: ignore[attr-defined]
    torch.uint8,
)
FLOAT_DTYPES = tuple(_FLOAT_FORMATS)

# Dtypes whose blocks can have power-of-two (e8m0) scales: those of the microscaling specification.
POWER_OF_TWO_SCALE_DTYPES = (torch.int8, *sorted(FLOAT_DTYPES, key=str))


def format_of(dtype: torch.dtype) -> Format:
    """The engine's name for the values of ``dtype``."""
    return _FLOAT_FORMATS.get(dtype, Format.INT)


def is_float_format(dtype: torch.dtype) -> bool:
    """Whether quantized values are floating-point numbers."""
    return dtype in _FLOAT_FORMATS


def bits_of(dtype: torch.dtype) -> int:
    """Bits of one value of ``dtype``; RuntimeError if its name does not say."""
    found = re.search(r"(?:int|float)(\d+)", str(dtype))
    if found is None:
        raise RuntimeError(f"Unable to extract number of bits from dtype {dtype}")
    return int(found[1])


def storage_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds quantized values of ``dtype`` one by one."""
    if dtype == FLOAT4:
        return torch.float8_e4m3fn
    bits = bits_of(dtype)
    if bits >= 8 or dtype.is_floating_point:
        return dtype
    return torch.uint8 if str(dtype).startswith("torch.uint") else torch.int8
