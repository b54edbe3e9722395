"""``observe_range``: minimum and maximum of each block."""

from collections.abc import Iterator

import torch

from benchmarks.cases import GRANULARITIES, Case, Sweep, make_input
from benchmarks.harness import Bench, add_if_supported
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]

_FULL = [("int8", granularity) for granularity in GRANULARITIES]
_QUICK = [("int8", "tensor"), ("int8", "block 32")]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("observe_range", sweep.select(_FULL, _QUICK))


def build(case: Case) -> Bench:
    x = make_input(case)
    blocks = case.numel // (case.block_size[0] * case.block_size[1])
    floor = (case.numel + 2 * blocks) * case.element_bytes
    bench = bench_of(case, "observe_range", (x, case.block_size), floor, blocks * case.element_bytes)
    if case.granularity == "tensor":
        add_if_supported(bench, "torch", lambda: torch.aminmax(x))
    elif case.granularity == "block 32":
        add_if_supported(bench, "torch", lambda: torch.aminmax(x.view(-1, 32), dim=1))
    else:
        axis = 0 if case.granularity == "channel 1" else 1
        add_if_supported(bench, "torch", lambda: torch.aminmax(x, dim=axis))
    return bench
