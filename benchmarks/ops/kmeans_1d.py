"""``kmeans_1d``: palettes of 16 or 256, of a tensor or of each row; exact, or of values in decimal steps.

"half kept" are decimal steps of a random half of the elements.
"""

from collections.abc import Iterator

import torch

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.lookup import COMBINATIONS, QUICK_COMBINATIONS
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]

# Exact clustering of as many distinct float32 values as a tensor has takes seconds, the reference minutes.
_EXACT_UP_TO = 1024
_REFERENCE_UP_TO = 64


def cases(sweep: Sweep) -> Iterator[Case]:
    for variant in ("exact", "decimals", "half kept"):
        for case in sweep.over("kmeans_1d", sweep.select(COMBINATIONS, QUICK_COMBINATIONS), variant=variant):
            quick = case.dtype != "fp32" or case.granularity != "tensor" or case.size <= _EXACT_UP_TO
            if variant != "exact" or quick:
                yield case


def build(case: Case) -> Bench:
    x = make_input(case)
    clusters = 16 if case.format == "int4" else 256
    decimals = None if case.variant == "exact" else 4
    kept = None
    if case.variant == "half kept":
        kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    blocks = case.numel // (case.block_size[0] * case.block_size[1])
    args = (x, kept, case.block_size, clusters, decimals)
    read = x.nbytes + (0 if kept is None else kept.nbytes)
    bench = bench_of(case, "kmeans_1d", args, read, 4 * blocks * clusters)
    if case.size > _REFERENCE_UP_TO:
        bench.contenders.pop("reference", None)
    return bench
