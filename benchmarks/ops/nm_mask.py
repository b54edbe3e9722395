"""``nm_mask``: ones for the largest of every few neighbours."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]

_FULL = [
    *((pattern, "axis 1") for pattern in ("2:4", "1:4", "4:8", "3:6", "3:12", "8:16", "1:32", "16:32")),
    *((pattern, "axis 0") for pattern in ("2:4", "3:6", "8:16", "16:32")),
]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("nm_mask", sweep.select(_FULL, _FULL[:1]))


def build(case: Case) -> Bench:
    n, m = map(int, case.format.split(":"))
    axis = int(case.granularity.removeprefix("axis "))
    x = make_input(case).narrow(axis, 0, case.size // m * m).contiguous()
    return bench_of(case, "nm_mask", (x, n, m, axis), 2 * x.nbytes, x.nbytes)
