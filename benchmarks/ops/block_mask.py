"""``block_mask``: ones for the channels, or blocks, of largest norm."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of
from benchmarks.pruning import SPARSITIES

__all__ = ["build", "cases"]

_FULL = [("50 %", "channel 0"), ("50 %", "channel 1"), ("50 %", "4x4")]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("block_mask", sweep.select(_FULL, _FULL[:1]))


def build(case: Case) -> Bench:
    x = make_input(case)
    block_size = (4, 4) if case.granularity == "4x4" else case.block_size
    blocks = case.numel // (block_size[0] * block_size[1])
    num_keep = blocks - int(SPARSITIES[case.format] * blocks)
    return bench_of(case, "block_mask", (x, num_keep, block_size), 2 * x.nbytes, x.nbytes)
