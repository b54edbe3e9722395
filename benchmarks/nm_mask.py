"""``nm_mask``: ones for the largest of every few neighbours."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.operators import bench_of

__all__ = ["build", "cases"]

_FULL = [("2:4", "axis 1"), ("1:4", "axis 1"), ("2:4", "axis 0"), ("4:8", "axis 1")]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("nm_mask", sweep.select(_FULL, _FULL[:1]))


def build(case: Case) -> Bench:
    x = make_input(case)
    n, m = map(int, case.format.split(":"))
    axis = int(case.granularity.removeprefix("axis "))
    return bench_of(case, "nm_mask", (x, n, m, axis), 2 * x.nbytes, x.nbytes)
