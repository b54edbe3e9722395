"""``fake_quantize``: forward with the mask that the backward needs, parameters given."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import BLOCK_SCALED, GRANULARITIES, Case, Sweep, make_input
from benchmarks.harness import Bench, add_if_supported
from benchmarks.ops.operators import MASK_BYTES, bench_of, qparams_of, value_range

__all__ = ["build", "cases"]

_FULL = [
    *(("int8", granularity) for granularity in GRANULARITIES),
    ("fp8 e4m3", "channel 0"),
    ("fp8 e5m2", "channel 0"),
    *BLOCK_SCALED,
]
_QUICK = [("int8", "tensor"), ("int8", "block 32"), ("fp4 e2m1", "block 32")]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("fake_quantize", sweep.select(_FULL, _QUICK))


def build(case: Case) -> Bench:
    x = make_input(case)
    scale, zero_point = qparams_of(case, x)
    fmt, quant_min, quant_max = value_range(case)
    args = (x, scale, zero_point, None, case.block_size, fmt, quant_min, quant_max, True)
    floor = case.numel * (2 * case.element_bytes + MASK_BYTES)
    bench = bench_of(case, "fake_quantize_forward", args, floor, x.nbytes)
    if zero_point is not None and case.granularity != "block 32":
        qparams, limits = (scale.flatten(), zero_point.flatten()), (int(quant_min), int(quant_max))
        if case.granularity == "tensor":
            function: Callable[..., Any] = torch.fake_quantize_per_tensor_affine
            rest: tuple[int, ...] = limits
        else:
            function = torch.fake_quantize_per_channel_affine
            rest = (1 if case.granularity == "channel 1" else 0, *limits)
        add_if_supported(bench, "torch", lambda: function(x, *qparams, *rest))
    return bench
