"""``kmeans_1d``: palettes of 16 or 256, of a tensor or of each row; exact, or of values in decimal steps."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.lookup import COMBINATIONS, QUICK_COMBINATIONS
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]

# Exact clustering of as many distinct float32 values as a tensor has takes seconds, the reference minutes.
_EXACT_UP_TO = 1024
_REFERENCE_UP_TO = 64


def cases(sweep: Sweep) -> Iterator[Case]:
    for variant in ("exact", "decimals"):
        for case in sweep.over("kmeans_1d", sweep.select(COMBINATIONS, QUICK_COMBINATIONS), variant=variant):
            quick = case.dtype != "fp32" or case.granularity != "tensor" or case.size <= _EXACT_UP_TO
            if variant == "decimals" or quick:
                yield case


def build(case: Case) -> Bench:
    x = make_input(case)
    clusters = 16 if case.format == "int4" else 256
    decimals = 4 if case.variant == "decimals" else None
    blocks = case.numel // (case.block_size[0] * case.block_size[1])
    args = (x, None, case.block_size, clusters, decimals)
    bench = bench_of(case, "kmeans_1d", args, x.nbytes, 4 * blocks * clusters)
    if case.size > _REFERENCE_UP_TO:
        bench.contenders.pop("reference", None)
    return bench
