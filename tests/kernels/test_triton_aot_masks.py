"""Ahead of time: masks, and weights under them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coreai_kernels.triton import masks, sampled_mask
from tests.kernels.aot_support import ARCHITECTURES, BF16, FP32, Variant, check, meta, short


def _nm(dtype: torch.dtype, n: int, m: int, axis: int) -> Variant:
    in_registers = m in (4, 8) and axis == 1
    return Variant(
        f"nm-{short(dtype)}-{n}_{m}-axis_{axis}",
        lambda: masks.nm_mask(meta(1024, 4096, dtype=dtype), n, m, axis),
        ("neighbours" if in_registers else "groups",),
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


VARIANTS = [
    *_sampled(FP32),
    *_sampled(BF16),
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


@ARCHITECTURES
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_compiled(variant: Variant, arch: int, compiled: list[tuple[str, Any]], tmp_path: Path) -> None:
    check(variant, compiled, tmp_path)
