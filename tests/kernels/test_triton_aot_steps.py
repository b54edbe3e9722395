"""Ahead of time: observing and quantizing in one step, for one tensor or many."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coreai_kernels import Format, QuantConfig, RangeUpdate, ScaleFormat, Scheme
from coreai_kernels.triton import foreach, gptq_columns, observe_and_fake_quantize, observe_range
from tests.kernels.aot_support import (
    ARCHITECTURES,
    BF16,
    BLOCKS,
    FORMATS,
    FP32,
    Variant,
    check,
    meta,
    parameters,
    short,
)


def step(
    blocks: str,
    dtype: torch.dtype,
    format: str,
    kernels: tuple[str, ...],
    *,
    scheme: Scheme = Scheme.SYMMETRIC,
    update: RangeUpdate = RangeUpdate.MOVING_AVERAGE,
    use_minval: bool = False,
    bounds: tuple[float | None, float | None] = (None, None),
    shape: tuple[int, ...] = (1024, 4096),
    block: tuple[int, ...] | None = None,
    **expected: Any,
) -> Variant:
    block = block or BLOCKS[blocks]
    scale, zero_point, minval = parameters(shape, block)
    running = (torch.empty_like(scale, dtype=dtype), torch.empty_like(scale, dtype=dtype))
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        is_int = fmt == Format.INT
        return observe_and_fake_quantize.observe_and_fake_quantize_(
            meta(*shape, dtype=dtype),
            scale,
            zero_point if is_int else None,
            minval if is_int else None,
            *running,
            True,
            QuantConfig(
                block,
                scheme,
                fmt,
                quant_min,
                quant_max,
                use_minval=use_minval,
                update=update,
                range_min=bounds[0],
                range_max=bounds[1],
                scale_format=ScaleFormat.E8M0 if fmt == Format.E2M1 else ScaleFormat.FLOAT32,
            ),
            True,
        )

    name = f"step-{blocks}-{short(dtype)}-{format}-{scheme.name.lower()}-{update.name.lower()}"
    return Variant(name + "_minval" * use_minval, run, kernels, **expected)


def foreach_step(
    blocks: str, dtype: torch.dtype, format: str, shape: tuple[int, ...] = (128, 96), **expected: Any
) -> Variant:
    block = {"rows": (1, 96), "columns": (128, 1), "tensor": shape}.get(blocks, BLOCKS.get(blocks))
    scale, zero_point, minval = parameters(shape, block)
    running = torch.empty_like(scale, dtype=dtype)
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        is_int = fmt == Format.INT
        return foreach.foreach_observe_and_fake_quantize_(
            [meta(*shape, dtype=dtype)] * 3,
            [scale] * 3,
            [zero_point] * 3 if is_int else [],
            [minval] * 3 if is_int else [],
            [running] * 3,
            [running] * 3,
            True,
            QuantConfig(
                (*block,) * 3,
                ASYMMETRIC,
                fmt,
                quant_min,
                quant_max,
                update=RangeUpdate.MOVING_AVERAGE,
                scale_format=ScaleFormat.E8M0 if fmt == Format.E2M1 else ScaleFormat.FLOAT32,
            ),
            True,
        )

    return Variant(f"foreach-step-{blocks}-{short(dtype)}-{format}", run, ("register_tile_list",), **expected)


def _foreach_forward(dtype: torch.dtype, format: str) -> Variant:
    scale, zero_point, _ = parameters((64, 128), (1, 32))
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        zero_points = [zero_point] * 2 if fmt == Format.INT else []
        inputs = [meta(64, 128, dtype=dtype)] * 2
        return foreach.foreach_fake_quantize_forward(
            inputs, [scale] * 2, zero_points, [], [1, 32] * 2, fmt, quant_min, quant_max, True
        )

    return Variant(f"foreach-forward-{short(dtype)}-{format}", run, ("register_tile_list",))


def _foreach_backward(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        grads = [meta(64, 128, dtype=dtype), meta(96, 96, dtype=dtype)]
        return foreach.foreach_fake_quantize_backward(grads, meta(2304, dtype=torch.uint8), [0, 1024], [])

    return Variant(f"foreach-backward-{short(dtype)}", run, ("backward_list",), divides=False)


def _foreach_backward_in_place(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        grads = [meta(64, 128, dtype=dtype), meta(96, 96, dtype=dtype)]
        foreach.foreach_fake_quantize_backward_(grads, meta(2304, dtype=torch.uint8), [0, 1024], [])

    return Variant(f"foreach-backward-in-place-{short(dtype)}", run, ("backward_list",), divides=False)


def _gptq(format: str) -> Variant:
    fmt, quant_min, quant_max = FORMATS[format]
    scale, zero_point, _ = parameters((128, 4096), (128, 1))

    def run() -> Any:
        zero_points = zero_point if fmt == Format.INT else None
        factor = meta(128, 128)
        return gptq_columns.gptq_columns(
            meta(128, 4096), factor, scale, zero_points, None, [0] * 128, int(fmt), quant_min, quant_max
        )

    # A thread has one row: its loads and stores are of 4 bytes, side by side in a warp.
    return Variant(f"gptq-{format}", run, ("gptq_columns",), wide_loads=False, wide_stores=False)


def observation(blocks: str, dtype: torch.dtype, kernels: tuple[str, ...], **expected: Any) -> Variant:
    def run() -> Any:
        return observe_range.observe_range(meta(1024, 4096, dtype=dtype), list(BLOCKS[blocks]))

    return Variant(
        f"range-{blocks}-{short(dtype)}", run, kernels, **{"wide_stores": False, "divides": False} | expected
    )


ASYMMETRIC, GLOBAL, LATEST = Scheme.ASYMMETRIC, RangeUpdate.GLOBAL_MINMAX, RangeUpdate.LATEST
VARIANTS = [
    step("runs_32", FP32, "int4", ("register_tile",)),
    step("runs_32", BF16, "e2m1", ("register_tile",), update=LATEST),
    step("runs_32", BF16, "uint8", ("register_tile",), scheme=ASYMMETRIC, update=GLOBAL, use_minval=True),
    step("rows", FP32, "uint8", ("register_tile",), scheme=ASYMMETRIC, bounds=(-1.0, None)),
    step("rows", BF16, "int4", ("register_tile",)),
    step("rows_16384", FP32, "int4", ("register_tile",), shape=(64, 16384), block=(1, 16384)),
    step(
        "rows_20000",
        BF16,
        "uint8",
        ("register_tile",),
        scheme=ASYMMETRIC,
        shape=(64, 20000),
        block=(1, 20000),
    ),
    step(
        "rows_32768",
        FP32,
        "uint8",
        ("register_tile",),
        scheme=ASYMMETRIC,
        shape=(64, 32768),
        block=(1, 32768),
    ),
    step("rows_32768", BF16, "int4", ("register_tile",), shape=(64, 32768), block=(1, 32768)),
    step("columns_of_32", FP32, "uint8", ("register_tile",), scheme=ASYMMETRIC),
    step("columns_of_32", BF16, "int4", ("register_tile",)),
    step("columns", FP32, "int4", ("register_tile",)),
    step("columns", BF16, "uint8", ("register_tile",), scheme=ASYMMETRIC),
    step("blocks_2d", FP32, "int4", ("register_tile",)),
    step("blocks_2d", BF16, "e4m3", ("register_tile",), update=GLOBAL),
    step(
        "channels", FP32, "uint8", ("strided", "finish", "rows"), shape=(8, 64, 56, 56), block=(8, 1, 56, 56)
    ),
    step("tensor", FP32, "int4", ("strided", "one_block")),
    step("tensor", BF16, "uint8", ("strided", "one_block"), scheme=ASYMMETRIC),
    step("tensor_large", BF16, "e4m3", ("strided", "one_block"), shape=(4096, 4096), block=(4096, 4096)),
    step("odd_rows", FP32, "int4", ("strided", "flat"), shape=(64, 147), block=(1, 147), wide_loads=False),
    step(
        "blocks_conv",
        FP32,
        "int4",
        ("any_block", "rows"),
        shape=(64, 64, 4, 4),
        block=(32, 32, 1, 1),
        wide_loads=False,
    ),
    *(foreach_step(blocks, FP32, "int4") for blocks in ("runs_32", "rows", "columns", "tensor")),
    foreach_step("runs_32", BF16, "e2m1"),
    foreach_step("rows", BF16, "uint8"),
    _foreach_forward(FP32, "int4"),
    _foreach_forward(BF16, "e4m3"),
    _foreach_backward(FP32),
    _foreach_backward(BF16),
    _foreach_backward_in_place(FP32),
    _foreach_backward_in_place(BF16),
    _gptq("int4"),
    _gptq("e2m1"),
    observation("tensor", FP32, ("strided", "finish")),
    observation("rows", BF16, ("strided",)),
    observation("columns", FP32, ("strided", "finish")),
    observation("columns_of_32", BF16, ("strided",)),
    observation("blocks_2d", FP32, ("strided",)),
]


@ARCHITECTURES
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiled(variant: Variant, arch: int, compiled: list[tuple[str, Any]], tmp_path: Path) -> None:
    check(variant, compiled, tmp_path)
