"""Rounding to fp8 and fp4, over every bfloat16 and around every value where rounding turns."""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format
from coreai_kernels.reference.rounding import round_to_format
from tests.kernels.support import FLOAT_RANGES, assert_same_bits

FP8 = {Format.E4M3: torch.float8_e4m3fn, Format.E5M2: torch.float8_e5m2}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def every_bfloat16() -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def neighbours_of_ties(values: list[float]) -> Tensor:
    """Each value, each midpoint of two values, and the float32 numbers next to them, with both signs."""
    points = torch.tensor(values, dtype=torch.float32).unique()
    points = torch.cat([points, (points[1:] + points[:-1]) / 2])
    infinity = torch.tensor(float("inf"))
    around = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])
    return torch.cat([around, -around])


def finite_values(fmt: Format) -> list[float]:
    if fmt == Format.E2M1:
        return E2M1
    codes = torch.arange(0, 128, dtype=torch.uint8).view(FP8[fmt]).float()
    return codes[codes.isfinite()].tolist()


def samples(fmt: Format) -> Tensor:
    limit = FLOAT_RANGES[fmt]
    x = torch.cat([every_bfloat16(), neighbours_of_ties(finite_values(fmt))])
    return x[(x.abs() <= limit) | x.isnan()]


@pytest.mark.parametrize("fmt", FP8, ids=lambda f: f.name)
def test_fp8_is_torchs_cast(fmt: Format) -> None:
    x = samples(fmt)
    assert_same_bits(round_to_format(x, fmt), x.to(FP8[fmt]).float())


def test_fp4_is_the_nearest_value_with_ties_to_even() -> None:
    x = samples(Format.E2M1)
    x = x[~x.isnan()]
    values = torch.tensor(E2M1, dtype=torch.float64)
    distance = (x.abs().double().unsqueeze(1) - values).abs()
    # Of two equally near values, the one with an even mantissa: an even position in the list.
    is_nearest = distance == distance.min(1, keepdim=True).values
    is_even = torch.arange(len(E2M1)) % 2 == 0
    nearest = values[(2 * is_nearest + 1 * (is_nearest & is_even)).argmax(1)]
    assert_same_bits(round_to_format(x, Format.E2M1), nearest.float().copysign(x))


@pytest.mark.parametrize("fmt", [Format.E4M3, Format.E5M2, Format.E2M1], ids=lambda f: f.name)
def test_every_backend_rounds_alike(fmt: Format) -> None:
    x = samples(fmt)
    limit = FLOAT_RANGES[fmt]
    block = {"block_size": (x.numel(),), "quant_min": -limit, "quant_max": limit, "format": fmt}
    one = torch.ones(1)
    assert_same_bits(ck.fake_quantize(x, one, **block), round_to_format(x, fmt))
    stored = ck.quantize(x, one, **block, dtype=FP8.get(fmt, torch.float8_e4m3fn))
    assert_same_bits(stored.float(), round_to_format(x, fmt))
    back = ck.dequantize(stored, one, block_size=block["block_size"], quant_min=-limit, format=fmt)
    assert_same_bits(back, round_to_format(x, fmt))


@pytest.mark.parametrize("dtype", FP8.values(), ids=str)
def test_every_fp8_code_dequantizes(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    fmt = Format.E4M3 if dtype == torch.float8_e4m3fn else Format.E5M2
    values = ck.dequantize(codes, torch.ones(1), block_size=(256,), quant_min=-1, format=fmt)
    assert_same_bits(values, codes.float())
