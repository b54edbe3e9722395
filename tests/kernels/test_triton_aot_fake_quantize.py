"""Ahead of time: quantizing with parameters given, learned ranges, and packed bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coreai_kernels import Format, ScaleFormat, Scheme
from coreai_kernels.triton import bits, fake_quantize, learnable_range, qparams, quantize
from tests.kernels.aot_support import (
    ARCHITECTURES,
    BF16,
    BLOCKS,
    FORMATS,
    FP16,
    FP32,
    Variant,
    check,
    meta,
    parameters,
    short,
)


def forward(
    blocks: str,
    dtype: torch.dtype,
    format: str,
    *,
    minval: bool = False,
    mask: bool = True,
    shape: tuple[int, ...] = (1024, 4096),
    block: tuple[int, ...] | None = None,
    **expected: Any,
) -> Variant:
    block = block or BLOCKS[blocks]
    scale, zero_point, low = parameters(shape, block)
    fmt, quant_min, quant_max = FORMATS[format]
    is_int = fmt == Format.INT
    given = (zero_point if is_int and not minval else None, low if is_int and minval else None)
    name = f"forward-{blocks}-{short(dtype)}-{format}{'_minval' * minval}{'' if mask else '_without_mask'}"
    kernel = "flat" if blocks.startswith(("tensor", "odd")) else "rows"

    def run() -> Any:
        return fake_quantize.fake_quantize_forward(
            meta(*shape, dtype=dtype), scale, *given, list(block), fmt, quant_min, quant_max, mask
        )

    return Variant(name, run, (kernel,), **expected)


def _backward(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        mask = meta(1024 * 4096 // 8, dtype=torch.uint8)
        return fake_quantize.fake_quantize_backward(meta(1024, 4096, dtype=dtype), mask, [])

    return Variant(f"backward-{short(dtype)}", run, ("backward",), divides=False)


def _backward_in_place(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        mask = meta(1024 * 4096 // 8, dtype=torch.uint8)
        fake_quantize.fake_quantize_backward_(meta(1024, 4096, dtype=dtype), mask, [])

    return Variant(f"backward-in-place-{short(dtype)}", run, ("backward",), divides=False)


def _quantize(dtype: torch.dtype, stored: torch.dtype, format: str) -> Variant:
    scale, zero_point, _ = parameters((1024, 4096), (1, 32))
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        zp = zero_point if fmt == Format.INT else None
        x = meta(1024, 4096, dtype=dtype)
        return quantize.quantize(x, scale, zp, None, [1, 32], fmt, quant_min, quant_max, stored)

    return Variant(f"quantize-{short(dtype)}-{short(stored)}", run, ("rows",), wide_stores=False)


def _dequantize(stored: torch.dtype, dtype: torch.dtype, format: str) -> Variant:
    scale, zero_point, _ = parameters((1024, 4096), (1, 32))
    fmt, quant_min, _ = FORMATS[format]

    def run() -> Any:
        zp = zero_point if fmt == Format.INT else None
        x = meta(1024, 4096, dtype=stored)
        return quantize.dequantize(x, scale, zp, None, [1, 32], fmt, quant_min, dtype)

    return Variant(
        f"dequantize-{short(stored)}-{short(dtype)}", run, ("rows",), wide_loads=False, divides=False
    )


def _choose(
    dtype: torch.dtype, scheme: Scheme, format: str, scale_format: ScaleFormat = ScaleFormat.FLOAT32
) -> Variant:
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        low = meta(4096, dtype=dtype)
        return qparams.choose_qparams(low, low, scheme, fmt, quant_min, quant_max, scale_format)

    name = f"choose-{short(dtype)}-{scheme.name.lower()}-{format}-{scale_format.name.lower()}"
    divides = scale_format != ScaleFormat.E8M0
    return Variant(name, run, ("choose",), wide_loads=False, wide_stores=False, divides=divides)


def _learned(blocks: str, dtype: torch.dtype, has_low: bool, **expected: Any) -> Variant:
    block = BLOCKS[blocks]
    span, _, low = parameters((1024, 4096), block)
    x = meta(1024, 4096, dtype=dtype)
    levels = (0.0, 255.0) if has_low else (-128.0, 127.0)

    def run() -> Any:
        given = low if has_low else None
        return learnable_range.learnable_range_backward(x, x, given, span, list(block), *levels)

    name = f"learned-{blocks}-{short(dtype)}{'-low' * has_low}"
    wide = blocks != "columns"
    return Variant(name, run, ("backward",), wide_loads=wide, wide_stores=wide, **expected)


def _bits(width: int) -> list[Variant]:
    def pack() -> Any:
        return bits.pack_bits(meta(1 << 20, dtype=torch.uint8), width)

    def unpack() -> Any:
        return bits.unpack_bits(meta((1 << 20) * width // 8, dtype=torch.uint8), width, 1 << 20, True)

    plain = {"wide_loads": False, "wide_stores": False, "divides": False}
    return [
        Variant(f"pack-{width}", pack, ("pack",), **plain),
        Variant(f"unpack-{width}", unpack, ("unpack",), **plain),
    ]


VARIANTS = [
    *(forward(blocks, dtype, "int4") for blocks in BLOCKS for dtype in (FP32, BF16)),
    forward("runs_32", BF16, "e2m1"),
    forward("rows", FP32, "e4m3"),
    forward("columns", FP16, "e5m2"),
    forward("rows", BF16, "uint8", minval=True),
    forward("rows", FP16, "uint8", mask=False),
    forward("channels", FP32, "uint8", shape=(8, 64, 56, 56), block=(8, 1, 56, 56)),
    forward("odd_rows", FP32, "int4", shape=(64, 147), block=(1, 147)),
    forward(
        "odd_tensor", BF16, "int4", shape=(101, 99), block=(101, 99), wide_loads=False, wide_stores=False
    ),
    _backward(FP32),
    _backward(BF16),
    _backward_in_place(FP32),
    _backward_in_place(BF16),
    _quantize(FP32, torch.int8, "int4"),
    _quantize(BF16, torch.float8_e4m3fn, "e2m1"),
    _dequantize(torch.uint8, FP32, "uint8"),
    _dequantize(torch.float8_e5m2, BF16, "e5m2"),
    _dequantize(torch.float8_e4m3fn, FP16, "e4m3"),
    _choose(FP32, Scheme.ASYMMETRIC, "uint8"),
    _choose(BF16, Scheme.SYMMETRIC, "int4"),
    _choose(FP32, Scheme.SYMMETRIC, "e2m1", ScaleFormat.E8M0),
    _choose(FP32, Scheme.SYMMETRIC, "e2m1", ScaleFormat.E4M3),
    _learned("tensor", FP32, True),
    _learned("rows", BF16, False),
    _learned("columns", FP32, False),
    *_bits(4),
    *_bits(3),
]


@ARCHITECTURES
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiled(variant: Variant, arch: int, compiled: list[tuple[str, Any]], tmp_path: Path) -> None:
    check(variant, compiled, tmp_path)
