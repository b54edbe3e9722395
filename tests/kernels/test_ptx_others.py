"""Compiled code of masks, look-ups and packed bits, run by the interpreter of PTX, against the reference."""

import importlib.util
import os

import pytest
import torch

from coreai_kernels.reference import apply_mask as reference_product
from coreai_kernels.reference import bits as reference_bits
from coreai_kernels.reference import lookup as reference_lookup
from coreai_kernels.reference import nm_mask as reference_nm
from tests.kernels.support import assert_same_bits
from tests.kernels.triton_support import Layout

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles with Triton", allow_module_level=True)

from coreai_kernels.triton import bits, masks, palettes
from tests.emulation.triton_ptx import interpreted


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("n", "m", "axis", "dtype"),
    [
        (2, 4, 1, torch.bfloat16),
        (2, 4, 1, torch.float32),
        (4, 8, 1, torch.bfloat16),
        (3, 8, 1, torch.float32),
        (3, 6, 0, torch.float32),
    ],
)
def test_nm_mask(n: int, m: int, axis: int, dtype: torch.dtype) -> None:
    weight = Layout("weight", (24, 72), ()).tensor(dtype)
    with interpreted(90):
        got = masks.nm_mask(weight, n, m, axis)
    assert_same_bits(got, reference_nm.nm_mask(weight, n, m, axis))


def test_masked_weight() -> None:
    weight = Layout("weight", (24, 72), ()).tensor(torch.bfloat16)
    mask = (torch.rand(24, 72, generator=generator()) > 0.5).to(torch.bfloat16)
    with interpreted(80):
        got = masks.apply_mask(weight, mask)
    assert_same_bits(got, reference_product.apply_mask(weight, mask))


@pytest.mark.parametrize("arch", [80, 100])
def test_lookup(arch: int) -> None:
    indices = torch.randint(0, 16, (24, 64), dtype=torch.uint8, generator=generator())
    table = torch.randn(1, 16, 1, generator=generator())
    with interpreted(arch):
        got = palettes.lookup(indices, table, [24, 64])
    assert_same_bits(got, reference_lookup.lookup(indices, table, (24, 64)))


@pytest.mark.parametrize("width", [3, 4])
def test_packed_bits(width: int) -> None:
    values = torch.randint(0, 256, (1001,), dtype=torch.uint8, generator=generator())
    with interpreted(90):
        packed = bits.pack_bits(values, width)
        unpacked = bits.unpack_bits(packed, width, 1001, True)
    assert_same_bits(packed, reference_bits.pack_bits(values, width))
    assert_same_bits(unpacked, reference_bits.unpack_bits(packed, width, 1001, True))
