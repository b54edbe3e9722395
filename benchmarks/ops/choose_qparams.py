"""``choose_qparams``: parameters of a grid of ranges, one for each 32 elements of the matrix."""

from collections.abc import Iterator

import torch

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of, scale_format_of, value_range
from coreai_kernels import Scheme

__all__ = ["build", "cases"]

_INT_VARIANTS = ("symmetric", "asymmetric")


def cases(sweep: Sweep) -> Iterator[Case]:
    for variant in _INT_VARIANTS:
        yield from sweep.over("choose_qparams", [("int8", "block 32")], variant=variant)
    if not sweep.quick:
        yield from sweep.over("choose_qparams", [("fp4 e2m1", "block 32")], variant="power of two")


def build(case: Case) -> Bench:
    low, high = torch.aminmax(make_input(case).view(case.size, -1, 32), dim=2)
    scheme = Scheme.ASYMMETRIC if case.variant == "asymmetric" else Scheme.SYMMETRIC
    args = (low, high, int(scheme), *value_range(case), scale_format_of(case))
    result_bytes = low.numel() * 4
    floor = 2 * low.nbytes + 3 * result_bytes  # scale, zero point and minimum
    return bench_of(case, "choose_qparams", args, floor, result_bytes)
