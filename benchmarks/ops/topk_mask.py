"""``topk_mask``: ones for the largest magnitudes."""

from collections.abc import Iterator

import torch

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench, add_if_supported
from benchmarks.ops.operators import bench_of
from benchmarks.pruning import SPARSITIES

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over(
        "topk_mask", sweep.select([(name, "tensor") for name in SPARSITIES], [("75 %", "tensor")])
    )


def build(case: Case) -> Bench:
    x = make_input(case)
    num_keep = case.numel - int(SPARSITIES[case.format] * case.numel)
    floor = case.numel * 3 * case.element_bytes
    bench = bench_of(case, "topk_mask", (x, num_keep), floor, x.nbytes)

    def by_indices() -> torch.Tensor:
        indices = x.abs().flatten().topk(num_keep).indices
        return torch.zeros_like(x).view(-1).index_fill_(0, indices, 1.0).view_as(x)

    if case.size <= 2048:
        add_if_supported(bench, "torch", by_indices)
    return bench
