"""The CUDA C++ of ``quantize`` and ``dequantize`` without a GPU: its operators run on the CPU."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coreai_kernels as ck  # noqa: F401  (defines the operators)
from coreai_kernels import Format
from coreai_kernels.reference import fake_quantize as reference
from tests.kernels.cuda_support import ROOT, behind, emulated_operators
from tests.kernels.support import Case, assert_same_bits, assert_same_memory_format, cases

pytestmark = pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="needs the source tree")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_operators("quantize", ["quantize", "dequantize"], tmp_path_factory.mktemp("emulation"))


@settings(max_examples=250, deadline=None)
@given(
    case=cases(),
    formulation=st.sampled_from(["plain", "zero_point", "minval"]),
    elements=st.sampled_from([0, 0, 0, 1]),
    data=st.data(),
)
def test_any_blocks(
    library: ctypes.CDLL, case: Case, formulation: str, elements: int, data: st.DataObject
) -> None:
    x = case.tensor()
    if case.layout not in ("sliced", "expanded"):
        x = behind(x, elements)
    generator = torch.Generator().manual_seed(case.seed)
    grid = case.grid
    scale = (torch.rand(grid, generator=generator) + 0.5) * case.magnitude * 4 / case.quant_max
    is_int = case.format == Format.INT
    zero_point = minval = None
    if is_int and formulation == "zero_point":
        low, high = int(case.quant_min), int(case.quant_max)
        zero_point = torch.randint(low, high + 1, grid, generator=generator, dtype=torch.int32)
    if is_int and formulation == "minval":
        minval = -torch.rand(grid, generator=generator) * case.magnitude
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if is_int:
        dtypes += [torch.int8] if case.quant_max <= 127 else []
        dtypes += [torch.uint8] if case.quant_min >= 0 else []
    if case.format in (Format.E4M3, Format.E2M1):
        dtypes.append(torch.float8_e4m3fn)
    if case.format == Format.E5M2:
        dtypes.append(torch.float8_e5m2)
    stored = data.draw(st.sampled_from(dtypes))
    target = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    ops = torch.ops.coreai_emulated
    params = (scale, zero_point, minval, case.block_size, case.format, case.quant_min)
    found = ops.quantize(x, *params, case.quant_max, stored)
    wanted = reference.quantize(x, *params, case.quant_max, stored)
    assert_same_bits(found, wanted, "quantized")
    assert_same_memory_format(found, wanted)
    assert_same_bits(
        ops.dequantize(wanted, *params, target), reference.dequantize(wanted, *params, target), "dequantized"
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_code(dtype: torch.dtype) -> None:
    """All codes of eight bits, NaN and infinities among them, there and back."""
    fmt, most = (Format.E4M3, 448.0) if dtype == torch.float8_e4m3fn else (Format.E5M2, 57344.0)
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    params = (torch.ones(1), None, None, [256], fmt, -most)
    values = torch.ops.coreai_emulated.dequantize(codes, *params, torch.float32)
    assert_same_bits(values, codes.float(), "values")
    again = torch.ops.coreai_emulated.quantize(values, *params, most, dtype)
    assert_same_bits(again, reference.quantize(values, *params, most, dtype), "codes")


@pytest.mark.usefixtures("library")
def test_errors_name_the_argument() -> None:
    ops = torch.ops.coreai_emulated
    x = torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match="dtype must be int8, uint8"):
        ops.quantize(x, torch.ones(4), None, None, [1, 8], 0, -8.0, 7.0, torch.int32)
    with pytest.raises(RuntimeError, match="scale must have one value per block, that is 4; it has 2"):
        ops.quantize(x, torch.ones(2), None, None, [1, 8], 0, -8.0, 7.0, torch.int8)
    with pytest.raises(RuntimeError, match="input must be int8, uint8"):
        ops.dequantize(x.int(), torch.ones(4), None, None, [1, 8], 0, -8.0, torch.float32)
