"""``palettize``: the nearest of 16 or 256 centroids, one palette or one a row."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.lookup import COMBINATIONS, QUICK_COMBINATIONS, palette_of
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("palettize", sweep.select(COMBINATIONS, QUICK_COMBINATIONS))


def build(case: Case) -> Bench:
    args = (make_input(case), palette_of(case), case.block_size)
    floor = case.numel * (case.element_bytes + 1)
    return bench_of(case, "palettize", args, floor, case.numel)
