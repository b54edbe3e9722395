"""Triton's kernels, compiled for AMD's gfx942 (MI300): nothing in them is NVIDIA's alone.

The compiler and linker for it are in Triton's wheel. Of each kernel one of the variants that are compiled for
NVIDIA's GPUs. How often instructions run is not counted here, and no such GPU has run them.
"""

import re
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.kernels import test_triton_aot_fake_quantize as fake_quantize
from tests.kernels import test_triton_aot_masks as masks
from tests.kernels import test_triton_aot_palettes as palettes
from tests.kernels import test_triton_aot_steps as steps
from tests.kernels.aot_support import Variant, compile_only

ARCHITECTURE = "gfx942"
# What the compiler writes about a kernel, for the loader.
RESOURCES = re.compile(r"\.(private_segment_fixed_size|[sv]gpr_spill_count|wavefront_size):\s*(\d+)")
# Flags of operations, and operations, that are not rounded as IEEE 754 says. llvm.fma is, and is there only
# where a kernel says so; fmuladd is what a compiler may contract.
INEXACT = re.compile(
    r"\b(fast|contract|afn|arcp|reassoc|nnan|ninf|nsz)\b|!fpmath|llvm\.(fmuladd|amdgcn\.rcp)"
)


def variants() -> list[Variant]:
    """One of each kernel."""
    found: dict[tuple[str, ...], Variant] = {}
    of_palettes = [
        Variant(name, run, kernels, False, False, exact=kernels != ("soft",))
        for name, (kernels, run) in palettes.VARIANTS.items()
    ]
    for variant in (*fake_quantize.VARIANTS, *masks.VARIANTS, *of_palettes, *steps.VARIANTS):
        found.setdefault(variant.kernels, variant)
    return list(found.values())


@pytest.mark.parametrize("variant", variants(), ids=lambda variant: variant.name)
def test_compiled(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, Any]] = compile_only(ARCHITECTURE, monkeypatch)
    variant.run()
    assert tuple(name for name, _ in compiled) == variant.kernels
    for _, kernel in compiled:
        assert kernel.metadata.target.warp_size == 64
        assert kernel.metadata.num_warps * 64 <= 1024
        assert kernel.asm["hsaco"].startswith(b"\x7fELF")
        used = {name: int(value) for name, value in RESOURCES.findall(kernel.asm["amdgcn"])}
        assert used["wavefront_size"] == 64
        assert (used["private_segment_fixed_size"], used["vgpr_spill_count"]) == (0, 0)
        # Subnormal numbers are kept.
        assert re.search(r"denorm_mode_32 3", kernel.asm["amdgcn"])
        if variant.exact:
            assert not INEXACT.search(kernel.asm["llir"])
    first, last = compiled[0][1].asm["amdgcn"], compiled[-1][1].asm["amdgcn"]
    # At least eight bytes a thread: tiles made for warps of 32 threads are shared by twice as many.
    assert not variant.wide_loads or re.search("_load_dwordx[24]", first)
    assert not variant.wide_stores or re.search("_store_dwordx[24]", last)
