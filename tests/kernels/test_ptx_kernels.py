"""What Triton compiles the kernels to, run by the interpreter of PTX: bit for bit what the reference defines.

Triton's own interpreter shows that the kernels say the right thing. These show that the compiled code does:
contraction, approximate division, flushed subnormals, missing barriers and wrong layouts would differ here.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from coreai_kernels import Format, QuantConfig, ScaleFormat, Scheme
from coreai_kernels.reference import fake_quantize as reference
from coreai_kernels.reference import observe_and_fake_quantize as reference_step
from coreai_kernels.reference.observe_range import observe_range as reference_range
from coreai_kernels.reference.qparams import choose_qparams as reference_choice
from tests.kernels.support import assert_same_bits
from tests.kernels.test_quotients import STEPS as STEPS_OF
from tests.kernels.test_quotients import neighbours, scales
from tests.kernels.triton_support import KINDS, LAYOUTS, STEPS, Kind, Layout, Step

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles with Triton", allow_module_level=True)

from coreai_kernels.triton import fake_quantize, observe_and_fake_quantize, observe_range, qparams
from tests.emulation.triton_ptx import interpreted

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_NAME = {layout.name: layout for layout in LAYOUTS}
KIND = {kind.name: kind for kind in KINDS}
STEP = {step.name: step for step in STEPS}


def compare(got: Sequence[Any], wanted: Sequence[Any]) -> None:
    for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if other is not None:
            assert_same_bits(one, other, f"result {i}")


def forward(x: Tensor, layout: Layout, kind: Kind, params: dict[str, Tensor]) -> tuple[Any, ...]:
    given = (params["scale"], params.get("zero_point"), params.get("minval"))
    return (x, *given, list(layout.block_size), kind.format, kind.quant_min, kind.quant_max, True)


def check_forward(layout: Layout, kind: Kind, dtype: torch.dtype, arch: int, magnitude: float = 1.0) -> None:
    params = {
        name: value * magnitude if value.dtype == FP32 else value
        for name, value in kind.params(layout, "cpu").items()
    }
    x = (layout.tensor(FP32) * magnitude).to(dtype)
    arguments = forward(x, layout, kind, params)
    with interpreted(arch) as names:
        got = fake_quantize.fake_quantize_forward(*arguments)
    assert len(names) == 1
    compare(got, reference.forward(*arguments))


@pytest.mark.parametrize(
    ("layout", "kind", "dtype", "arch"),
    [
        ("tensor", "int4_zero_point", FP32, 80),
        ("tensor", "int8", BF16, 90),
        ("tensor", "e4m3", BF16, 80),
        ("tensor_odd", "int4_zero_point", FP32, 100),
        ("rows", "int4_zero_point", BF16, 100),
        ("rows_masked", "uint8_minval", FP32, 90),
        ("rows_long", "e4m3", FP16, 90),
        ("runs_32", "int8", FP32, 90),
        ("runs_32", "e2m1", BF16, 100),
        ("columns", "int8", BF16, 90),
        ("columns_odd", "int4_zero_point", FP32, 80),
        ("channels_last", "e5m2", BF16, 80),
        ("blocks_2d", "int_as_e5m2", FP32, 90),
    ],
)
def test_forward(layout: str, kind: str, dtype: torch.dtype, arch: int) -> None:
    check_forward(BY_NAME[layout], KIND[kind], dtype, arch)


@pytest.mark.parametrize("magnitude", [2.0**-58, 2.0**60, 2.0**-90, 2.0**90], ids=str)
@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_forward_of_scales_near_the_ends(kind: str, magnitude: float) -> None:
    """At both ends of the scales that products with reciprocals are for, and beyond."""
    check_forward(BY_NAME["rows"], KIND[kind], FP32, 90, magnitude)


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_forward_next_to_where_rounding_changes(kind: str) -> None:
    """There a product that is not corrected, or corrected with two roundings, is on the wrong side."""
    chosen = KIND[kind]
    scale = scales(torch.Generator().manual_seed(1))[:24]
    x = neighbours(scale * STEPS_OF[chosen.format])
    arguments = forward(x, Layout("steps", tuple(x.shape), (1, x.shape[1])), chosen, {"scale": scale})
    with interpreted(90):
        got = fake_quantize.fake_quantize_forward(*arguments)
    compare(got, reference.forward(*arguments))


@pytest.mark.parametrize(("dtype", "in_place"), [(FP32, False), (BF16, False), (BF16, True)])
def test_backward(dtype: torch.dtype, in_place: bool) -> None:
    gradient = Layout("gradient", (60, 40), ()).tensor(dtype)
    mask = torch.randint(0, 256, (300,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask[:100] = 255
    wanted = reference.backward(gradient, mask, (0, 1))
    with interpreted(90):
        if in_place:
            fake_quantize.fake_quantize_backward_(gradient, mask, [])
            got = gradient
        else:
            got = fake_quantize.fake_quantize_backward(gradient, mask, [])
    assert_same_bits(got, wanted)


@pytest.mark.parametrize(
    ("layout", "step", "dtype", "arch"),
    [
        ("tensor", "int4_latest", BF16, 90),
        ("rows_long", "uint8_average", FP32, 80),
        ("rows", "uint8_minval_global", FP32, 100),
        ("rows_masked", "int4_clipped_minval", BF16, 80),
        ("columns", "e4m3_fixed", BF16, 90),
        ("runs_32", "e2m1_e8m0", BF16, 100),
        ("runs_32", "mxint8", FP32, 90),
        ("runs_32", "nvfp4", BF16, 90),
        ("columns_tall", "int4_latest", FP32, 90),
        ("blocks_2d", "uint8_average", FP16, 80),
    ],
)
def test_step(layout: str, step: str, dtype: torch.dtype, arch: int) -> None:
    check_step(BY_NAME[layout], STEP[step], dtype, arch)


def check_step(layout: Layout, step: Step, dtype: torch.dtype, arch: int, reverse: bool = False) -> None:
    """With a running range, first block first or last."""
    x = layout.tensor(dtype)
    config = QuantConfig(block_size=layout.block_size, **step.config)
    generator = torch.Generator().manual_seed(3)
    low, high = ((torch.rand(layout.grid, generator=generator) * sign).to(dtype) for sign in (-1, 1))
    with interpreted(arch, reverse=reverse):
        got = observe_and_fake_quantize.observe_and_fake_quantize(x, low, high, config, True)
    compare(got, reference_step.observe_and_fake_quantize(x, low, high, config, True))


@pytest.mark.parametrize("reverse", [False, True])
def test_step_of_a_tensor_in_parts(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large for a program: no order of the programs may matter."""
    monkeypatch.setattr(observe_range, "multiprocessors", lambda _: 1)
    layout = Layout("large", (3, 41, 290), (3, 41, 290))
    check_step(layout, STEP["uint8_average"], BF16, 90, reverse)


@pytest.mark.parametrize(
    ("layout", "dtype", "arch"), [("rows", BF16, 90), ("columns", FP32, 80), ("blocks_conv", FP32, 90)]
)
def test_observe(layout: str, dtype: torch.dtype, arch: int) -> None:
    x = BY_NAME[layout].tensor(dtype)
    with interpreted(arch):
        got = observe_range.observe_range(x, list(BY_NAME[layout].block_size))
    compare(got, reference_range(x, BY_NAME[layout].block_size))


@pytest.mark.parametrize(
    ("scheme", "format", "bounds", "scale_format"),
    [
        (Scheme.ASYMMETRIC, Format.INT, (0.0, 255.0), ScaleFormat.FLOAT32),
        (Scheme.SYMMETRIC, Format.E2M1, (-6.0, 6.0), ScaleFormat.E8M0),
        (Scheme.SYMMETRIC, Format.E2M1, (-6.0, 6.0), ScaleFormat.E4M3),
    ],
    ids=str,
)
def test_choose_qparams(
    scheme: Scheme, format: Format, bounds: tuple[float, float], scale_format: ScaleFormat
) -> None:
    flat = Layout("flat", (300,), (300,))
    arguments = (flat.tensor(FP32), flat.tensor(FP32, seed=1), scheme, format, *bounds, scale_format)
    with interpreted(90):
        got = qparams.choose_qparams(*arguments)
    wanted = reference_choice(*arguments)
    compare(got, [value if value is not None else None for value in wanted])
