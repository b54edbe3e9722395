"""``palettize``: the nearest of 16 or 256 centroids, one palette or one a row, also of rounded values."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.lookup import COMBINATIONS, QUICK_COMBINATIONS, palette_of
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    for variant in ("", "decimals"):
        yield from sweep.over("palettize", sweep.select(COMBINATIONS, QUICK_COMBINATIONS), variant=variant)


def build(case: Case) -> Bench:
    decimals = 4 if case.variant == "decimals" else None
    args = (make_input(case), palette_of(case), case.block_size, decimals)
    floor = case.numel * (case.element_bytes + 1)
    return bench_of(case, "palettize", args, floor, case.numel)
