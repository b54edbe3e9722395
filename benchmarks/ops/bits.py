"""``pack_bits`` and ``unpack_bits``: 4-bit integers, two a byte. The dtype of the model plays no part."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.cases import Case, Sweep
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]

_BITS = 4


def cases(sweep: Sweep) -> Iterator[Case]:
    one_dtype = replace(sweep, dtypes=sweep.dtypes[:1])
    for variant in ("pack", "unpack"):
        yield from one_dtype.over("bits", [("int4", "tensor")], variant=variant)


def build(case: Case) -> Bench:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (case.numel,), dtype=torch.int8, generator=generator)
    packed_bytes = case.numel * _BITS // 8
    floor = case.numel + packed_bytes
    if case.variant == "pack":
        return bench_of(case, "pack_bits", (values, _BITS), floor, packed_bytes)
    packed = torch.ops.coreai_kernels.pack_bits(values, _BITS)
    return bench_of(case, "unpack_bits", (packed, _BITS, case.numel, True), floor, case.numel)
