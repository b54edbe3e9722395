"""The table of formats against torch's own facts."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coreai_kernels import Format, ScaleFormat, formats
from coreai_kernels.formats import NUMBER_FORMATS, largest_exponent, native_header


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floating_point_rows(dtype: str) -> None:
    row, info = NUMBER_FORMATS[dtype], torch.finfo(getattr(torch, dtype))
    facts = row.format.facts
    assert (row.bits, row.quant_min, row.quant_max) == (info.bits, info.min, info.max)
    assert facts.largest == info.max
    assert 2.0**facts.min_exponent == info.tiny
    assert 2.0**-facts.mantissa_bits == info.eps
    assert facts.max_exponent == math.floor(math.log2(info.max))
    assert facts.has_infinity == bool(torch.tensor(math.inf).to(getattr(torch, dtype)).float().isinf())


def test_e2m1_has_eight_magnitudes() -> None:
    facts = Format.E2M1.facts
    step = 2.0 ** (facts.min_exponent - facts.mantissa_bits)
    magnitudes = {0.0, step}
    for exponent in range(facts.min_exponent, facts.max_exponent + 1):
        magnitudes |= {2.0**exponent, 1.5 * 2.0**exponent}
    assert sorted(magnitudes) == [0, 0.5, 1, 1.5, 2, 3, 4, facts.largest]


@pytest.mark.parametrize("dtype", [name for name in NUMBER_FORMATS if "int" in name])
def test_integer_rows(dtype: str) -> None:
    row, storage = NUMBER_FORMATS[dtype], torch.iinfo(getattr(torch, NUMBER_FORMATS[dtype].storage))
    assert row.quant_max - row.quant_min == 2**row.bits - 1
    assert storage.min <= row.quant_min < row.quant_max <= storage.max
    assert isinstance(getattr(torch, dtype), torch.dtype)


def test_scales_of_blocks_are_e4m3_numbers() -> None:
    smallest = torch.tensor([1], dtype=torch.uint8).view(torch.float8_e4m3fn).item()
    assert ScaleFormat.E4M3.facts.smallest == smallest


@pytest.mark.parametrize(("quant_max", "exponent"), [(127, 6), (31, 4), (1, 0), (100, 6)])
def test_largest_exponent_of_integers(quant_max: float, exponent: int) -> None:
    assert largest_exponent(Format.INT, quant_max) == exponent
    assert largest_exponent(Format.E4M3, quant_max) == 8


def test_header_names_every_format() -> None:
    header = native_header()
    for member in (*Format, *ScaleFormat):
        assert f"= {member.value}" in header
        if member.name not in ("INT", "FLOAT32"):
            assert f"k{member.name}" in header


def test_the_build_reads_the_table_without_torch() -> None:
    program = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['native_header'](); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(Path(formats.__file__))], check=True)
