"""``quantize``: to the dtype that a compressed model stores."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of, qparams_of, value_range

__all__ = ["COMBINATIONS", "QUICK_COMBINATIONS", "build", "cases"]

COMBINATIONS = [
    ("int4", "block 32"),
    ("int8", "channel 0"),
    ("fp8 e4m3", "channel 0"),
    ("fp4 e2m1", "block 32"),
]
QUICK_COMBINATIONS = [("int8", "channel 0")]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("quantize", sweep.select(COMBINATIONS, QUICK_COMBINATIONS))


def build(case: Case) -> Bench:
    x = make_input(case)
    scale, zero_point = qparams_of(case, x)
    storage = case.number_format.storage
    args = (x, scale, zero_point, None, case.block_size, *value_range(case), storage)
    floor = case.numel * (case.element_bytes + storage.itemsize)
    return bench_of(case, "quantize", args, floor, case.numel * storage.itemsize)
