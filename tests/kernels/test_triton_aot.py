"""Every Triton kernel compiled ahead of time for three GPU generations, and what the compiler made of it.

The operators run on meta tensors, with Triton's driver replaced by one that only names a target: what is
compiled is exactly what a launch on a GPU would compile (constants, specialization of arguments, warps).
"""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from coreai_kernels import Format, RangeUpdate, Scheme  # noqa: E402
from coreai_kernels.triton import (  # noqa: E402
    bits,
    fake_quantize,
    foreach,
    learnable_range,
    masks,
    observe_and_fake_quantize,
    observe_range,
    qparams,
    quantize,
    sampled_mask,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# A load or store of 16 bytes or more a thread, in the spellings of the PTX versions.
WIDE_LOAD = re.compile(r"ld\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)")
WIDE_STORE = re.compile(r"st\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)")


class NamedTarget:
    """A Triton driver without a device."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + self.target.arch  # its own cache of kernels, beside those of real devices

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Names and results of all kernels that the test's operator would launch on the architecture."""
    found: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__.removeprefix("_"), kernel))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", NamedTarget(request.node.callspec.params["arch"]))
    return found


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Variant:
    """An operator on certain tensors, and what is expected of it.

    Attributes:
        name: for the test's id.
        run: calls the operator.
        kernels: what it launches, in order.
        wide_loads: the first kernel reads 16 bytes a thread.
        wide_stores: the last kernel writes 16 bytes a thread.
        divides: the last kernel has an IEEE division.
    """

    name: str
    run: Callable[[], Any]
    kernels: tuple[str, ...]
    wide_loads: bool = True
    wide_stores: bool = True
    divides: bool = True


BLOCKS = {
    "tensor": (1024, 4096),
    "rows": (1, 4096),
    "columns": (1024, 1),
    "runs_32": (1, 32),
    "columns_of_32": (32, 1),
    "blocks_2d": (32, 32),
}
FORMATS = {
    "int4": (Format.INT, -8.0, 7.0),
    "uint8": (Format.INT, 0.0, 255.0),
    "e4m3": (Format.E4M3, -448.0, 448.0),
    "e5m2": (Format.E5M2, -57344.0, 57344.0),
    "e2m1": (Format.E2M1, -6.0, 6.0),
}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    grid = [size // part for size, part in zip(shape, block, strict=True)]
    return meta(*grid), meta(*grid, dtype=torch.int32), meta(*grid)


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
    scale, zero_point, low = _parameters(shape, block)
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
    scale, zero_point, minval = _parameters(shape, block)
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
            list(block),
            scheme,
            fmt,
            quant_min,
            quant_max,
            use_minval,
            update,
            0.01,
            *bounds,
            fmt == Format.E2M1,
            True,
        )

    name = f"step-{blocks}-{short(dtype)}-{format}-{scheme.name.lower()}-{update.name.lower()}"
    return Variant(name + "_minval" * use_minval, run, kernels, **expected)


def foreach_step(
    blocks: str, dtype: torch.dtype, format: str, shape: tuple[int, ...] = (128, 96), **expected: Any
) -> Variant:
    block = {"rows": (1, 96), "columns": (128, 1), "tensor": shape}.get(blocks, BLOCKS.get(blocks))
    scale, zero_point, minval = _parameters(shape, block)
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
            [*block] * 3,
            ASYMMETRIC,
            fmt,
            quant_min,
            quant_max,
            False,
            RangeUpdate.MOVING_AVERAGE,
            0.01,
            None,
            None,
            fmt == Format.E2M1,
            True,
        )

    return Variant(f"foreach-step-{blocks}-{short(dtype)}-{format}", run, ("held_list",), **expected)


def _foreach_forward(dtype: torch.dtype, format: str) -> Variant:
    scale, zero_point, _ = _parameters((64, 128), (1, 32))
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        zero_points = [zero_point] * 2 if fmt == Format.INT else []
        inputs = [meta(64, 128, dtype=dtype)] * 2
        return foreach.foreach_fake_quantize_forward(
            inputs, [scale] * 2, zero_points, [], [1, 32] * 2, fmt, quant_min, quant_max, True
        )

    return Variant(f"foreach-forward-{short(dtype)}-{format}", run, ("held_list",))


def _foreach_backward(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        grads = [meta(64, 128, dtype=dtype), meta(96, 96, dtype=dtype)]
        return foreach.foreach_fake_quantize_backward(grads, meta(2304, dtype=torch.uint8), [0, 1024], [])

    return Variant(f"foreach-backward-{short(dtype)}", run, ("backward_list",), divides=False)


def observation(blocks: str, dtype: torch.dtype, kernels: tuple[str, ...], **expected: Any) -> Variant:
    def run() -> Any:
        return observe_range.observe_range(meta(1024, 4096, dtype=dtype), list(BLOCKS[blocks]))

    return Variant(
        f"range-{blocks}-{short(dtype)}", run, kernels, **{"wide_stores": False, "divides": False} | expected
    )


def _quantize(dtype: torch.dtype, stored: torch.dtype, format: str) -> Variant:
    scale, zero_point, _ = _parameters((1024, 4096), (1, 32))
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        zp = zero_point if fmt == Format.INT else None
        x = meta(1024, 4096, dtype=dtype)
        return quantize.quantize(x, scale, zp, None, [1, 32], fmt, quant_min, quant_max, stored)

    return Variant(f"quantize-{short(dtype)}-{short(stored)}", run, ("rows",), wide_stores=False)


def _dequantize(stored: torch.dtype, dtype: torch.dtype, format: str) -> Variant:
    scale, zero_point, _ = _parameters((1024, 4096), (1, 32))
    fmt, quant_min, _ = FORMATS[format]

    def run() -> Any:
        zp = zero_point if fmt == Format.INT else None
        x = meta(1024, 4096, dtype=stored)
        return quantize.dequantize(x, scale, zp, None, [1, 32], fmt, quant_min, dtype)

    return Variant(
        f"dequantize-{short(stored)}-{short(dtype)}", run, ("rows",), wide_loads=False, divides=False
    )


def _backward(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        mask = meta(1024 * 4096 // 8, dtype=torch.uint8)
        return fake_quantize.fake_quantize_backward(meta(1024, 4096, dtype=dtype), mask, [])

    return Variant(f"backward-{short(dtype)}", run, ("backward",), divides=False)


def _choose(dtype: torch.dtype, scheme: Scheme, format: str, power_of_two: bool = False) -> Variant:
    fmt, quant_min, quant_max = FORMATS[format]

    def run() -> Any:
        low = meta(4096, dtype=dtype)
        return qparams.choose_qparams(low, low, scheme, fmt, quant_min, quant_max, power_of_two)

    name = f"choose-{short(dtype)}-{scheme.name.lower()}-{format}{'_e8m0' * power_of_two}"
    return Variant(name, run, ("choose",), wide_loads=False, wide_stores=False, divides=not power_of_two)


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


def _nm(dtype: torch.dtype, n: int, m: int, axis: int) -> Variant:
    in_registers = (m, axis) == (4, 1)
    return Variant(
        f"nm-{short(dtype)}-{n}_{m}-axis_{axis}",
        lambda: masks.nm_mask(meta(1024, 4096, dtype=dtype), n, m, axis),
        ("quads" if in_registers else "groups",),
        wide_loads=in_registers,
        wide_stores=in_registers,
        divides=False,
    )


def _norms(dtype: torch.dtype, axis: int) -> Variant:
    block_size = [1, 4096] if axis == 0 else [1024, 1]

    def run() -> Any:
        return masks._block_norms(meta(1024, 4096, dtype=dtype), block_size)

    name = f"norms-{short(dtype)}-axis_{axis}"
    return Variant(name, run, ("norms",), wide_loads=False, wide_stores=False, divides=False)


def _product(dtype: torch.dtype) -> Variant:
    def run() -> Any:
        return masks.apply_mask(meta(1024, 4096, dtype=dtype), meta(1024, 4096, dtype=dtype))

    return Variant(f"product-{short(dtype)}", run, ("product",), divides=False)


def _sampled(dtype: torch.dtype) -> list[Variant]:
    weight, logits, draw = meta(1024, 4096, dtype=dtype), meta(1024, 4096), meta(dtype=torch.int64)
    return [
        Variant(
            f"sampled-{short(dtype)}",
            lambda: sampled_mask.sampled_mask_forward(weight, logits, draw, 2**40),
            ("forward",),
            divides=False,
        ),
        Variant(
            f"sampled-backward-{short(dtype)}",
            lambda: sampled_mask.sampled_mask_backward(weight, weight, logits, draw, 2**40),
            ("backward",),
        ),
    ]


def _learned(blocks: str, dtype: torch.dtype, has_low: bool, **expected: Any) -> Variant:
    block = BLOCKS[blocks]
    span, _, low = _parameters((1024, 4096), block)
    x = meta(1024, 4096, dtype=dtype)
    levels = (0.0, 255.0) if has_low else (-128.0, 127.0)

    def run() -> Any:
        given = low if has_low else None
        return learnable_range.learnable_range_backward(x, x, given, span, list(block), *levels)

    name = f"learned-{blocks}-{short(dtype)}{'-low' * has_low}"
    return Variant(name, run, ("backward",), wide_loads=False, wide_stores=False, **expected)


ASYMMETRIC, GLOBAL, LATEST = Scheme.ASYMMETRIC, RangeUpdate.GLOBAL_MINMAX, RangeUpdate.LATEST
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
    step("runs_32", FP32, "int4", ("held",)),
    step("runs_32", BF16, "e2m1", ("held",), update=LATEST),
    step("runs_32", BF16, "uint8", ("held",), scheme=ASYMMETRIC, update=GLOBAL, use_minval=True),
    step("rows", FP32, "uint8", ("held",), scheme=ASYMMETRIC, bounds=(-1.0, None)),
    step("rows", BF16, "int4", ("held",)),
    step("rows_16384", FP32, "int4", ("held",), shape=(64, 16384), block=(1, 16384)),
    step("rows_20000", BF16, "uint8", ("held",), scheme=ASYMMETRIC, shape=(64, 20000), block=(1, 20000)),
    step("rows_32768", FP32, "uint8", ("held",), scheme=ASYMMETRIC, shape=(64, 32768), block=(1, 32768)),
    step("rows_32768", BF16, "int4", ("held",), shape=(64, 32768), block=(1, 32768)),
    step("columns_of_32", FP32, "uint8", ("held",), scheme=ASYMMETRIC),
    step("columns_of_32", BF16, "int4", ("held",)),
    step("columns", FP32, "int4", ("held",)),
    step("columns", BF16, "uint8", ("held",), scheme=ASYMMETRIC),
    step("blocks_2d", FP32, "int4", ("held",)),
    step("blocks_2d", BF16, "e4m3", ("held",), update=GLOBAL),
    step("channels", FP32, "uint8", ("nest", "finish", "rows"), shape=(8, 64, 56, 56), block=(8, 1, 56, 56)),
    step("tensor", FP32, "int4", ("nest", "one_block")),
    step("tensor", BF16, "uint8", ("nest", "one_block"), scheme=ASYMMETRIC),
    step("tensor_large", BF16, "e4m3", ("nest", "one_block"), shape=(4096, 4096), block=(4096, 4096)),
    step("odd_rows", FP32, "int4", ("nest", "flat"), shape=(64, 147), block=(1, 147), wide_loads=False),
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
    observation("tensor", FP32, ("nest", "finish")),
    observation("rows", BF16, ("nest",)),
    observation("columns", FP32, ("nest", "finish")),
    observation("columns_of_32", BF16, ("nest",)),
    observation("blocks_2d", FP32, ("nest",)),
    _quantize(FP32, torch.int8, "int4"),
    _quantize(BF16, torch.float8_e4m3fn, "e2m1"),
    _dequantize(torch.uint8, FP32, "uint8"),
    _dequantize(torch.float8_e5m2, BF16, "e5m2"),
    _dequantize(torch.float8_e4m3fn, FP16, "e4m3"),
    _choose(FP32, ASYMMETRIC, "uint8"),
    _choose(BF16, Scheme.SYMMETRIC, "int4"),
    _choose(FP32, Scheme.SYMMETRIC, "e2m1", power_of_two=True),
    *_sampled(FP32),
    *_sampled(BF16),
    _learned("tensor", FP32, True),
    _learned("rows", BF16, False),
    _learned("columns", FP32, False),
    *_bits(4),
    *_bits(3),
    _nm(FP32, 2, 4, 1),
    _nm(BF16, 1, 4, 1),
    _nm(FP32, 2, 4, 0),
    _nm(BF16, 4, 8, 1),
    _nm(FP32, 5, 32, 1),
    _norms(FP32, 0),
    _norms(BF16, 1),
    _product(FP32),
    _product(BF16),
]


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local memory, as the assembler wrote them into the machine code."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    printed = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiled(variant: Variant, arch: int, compiled: list[tuple[str, Any]], tmp_path: Path) -> None:
    variant.run()
    assert tuple(name for name, _ in compiled) == variant.kernels
    for _, kernel in compiled:
        assert kernel.metadata.enable_fp_fusion is False
        ptx = kernel.asm["ptx"]
        assert ".local" not in ptx
        used = resources(kernel.asm["cubin"], tmp_path)
        assert (used["STACK"], used["LOCAL"]) == (0, 0), used
        for inexact in ("fma.rn.f32", "div.full", "div.approx", "rcp.approx", ".ftz"):
            assert inexact not in ptx
    first, last = compiled[0][1].asm["ptx"], compiled[-1][1].asm["ptx"]
    assert not variant.wide_loads or WIDE_LOAD.search(first)
    assert not variant.wide_stores or WIDE_STORE.search(last)
    assert not variant.divides or "div.rn.f32" in last
