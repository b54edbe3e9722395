"""``dequantize``: from the stored dtype back."""

from collections.abc import Iterator

from benchmarks.cases import DTYPES, Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of, qparams_of, value_range
from benchmarks.ops.quantize import COMBINATIONS, QUICK_COMBINATIONS
from coreai_kernels.ops.library import implementation

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("dequantize", sweep.select(COMBINATIONS, QUICK_COMBINATIONS))


def build(case: Case) -> Bench:
    x = make_input(case)
    scale, zero_point = qparams_of(case, x)
    storage = case.number_format.storage
    fmt, quant_min, quant_max = value_range(case)
    stored = implementation("quantize")(
        x, scale, zero_point, None, case.block_size, fmt, quant_min, quant_max, storage
    )
    args = (stored, scale, zero_point, None, case.block_size, fmt, quant_min, DTYPES[case.dtype])
    floor = case.numel * (case.element_bytes + storage.itemsize)
    return bench_of(case, "dequantize", args, floor, x.nbytes)
