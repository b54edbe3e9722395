"""``apply_mask``: the product of a weight and its mask."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench, add_if_supported
from benchmarks.ops.operators import bench_of
from coreai_kernels import topk_mask

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("apply_mask", [("50 %", "tensor")])


def build(case: Case) -> Bench:
    x = make_input(case)
    mask = topk_mask(x, case.numel // 2)
    bench = bench_of(case, "apply_mask", (x, mask), 3 * x.nbytes, x.nbytes)
    add_if_supported(bench, "torch", lambda: x * mask)
    return bench
