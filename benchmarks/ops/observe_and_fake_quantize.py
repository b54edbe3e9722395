"""``observe_and_fake_quantize``: the whole training step of a fake quantizer; here without its module."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import BLOCK_SCALED, DTYPES, OTHER_INT_FORMATS, Case, Sweep, make_input
from benchmarks.harness import Bench, add_if_supported
from benchmarks.ops.operators import MASK_BYTES, bench_of, qparams_of, scale_format_of, value_range
from coreai_kernels import QuantConfig, RangeUpdate, Scheme
from coreai_kernels.reference.observe_and_fake_quantize import observe_and_fake_quantize as reference

__all__ = ["build", "cases", "floor_bytes"]

_FULL = [
    ("int4", "block 32"),
    ("int8", "tensor"),
    ("int8", "channel 0"),
    ("int8", "channel 1"),
    ("fp8 e4m3", "channel 0"),
    *((fmt, "channel 0") for fmt in OTHER_INT_FORMATS),
    *BLOCK_SCALED,
]
_QUICK = [("int4", "block 32"), ("int8", "tensor")]
_AVERAGING_CONSTANT = 0.01


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("observe_and_fake_quantize", sweep.select(_FULL, _QUICK), variant="moving_average")


def floor_bytes(case: Case) -> float:
    """One read where a block is a piece of a row, else two; one write; the mask."""
    reads = 1 if case.row_wise else 2
    return case.numel * ((reads + 1) * case.element_bytes + MASK_BYTES)


def build(case: Case) -> Bench:
    x = make_input(case)
    scale, zero_point = qparams_of(case, x)
    running_min = torch.full(scale.shape, -3.0, dtype=DTYPES[case.dtype])
    running_max = torch.full(scale.shape, 3.0, dtype=DTYPES[case.dtype])
    fmt, quant_min, quant_max = value_range(case)
    minval = None if zero_point is None else torch.zeros_like(scale)
    config = QuantConfig(
        block_size=case.block_size,
        scheme=int(Scheme.SYMMETRIC),
        format=fmt,
        quant_min=quant_min,
        quant_max=quant_max,
        update=int(RangeUpdate.MOVING_AVERAGE),
        averaging_constant=_AVERAGING_CONSTANT,
        scale_format=scale_format_of(case),
    )
    args = (x, scale, zero_point, minval, running_min, running_max, True, config.packed(), True)
    bench = bench_of(case, "observe_and_fake_quantize_", args, floor_bytes(case), x.nbytes)
    bench.compilable = lambda compiler: _compiled(compiler(reference), x, (running_min, running_max), config)
    if zero_point is not None and case.granularity != "block 32":
        _add_torch(bench, case, x)
    return bench


def _compiled(
    step: Callable[..., Any],
    x: torch.Tensor,
    running: tuple[torch.Tensor, torch.Tensor],
    config: QuantConfig,
) -> Callable[[], object]:
    return lambda: step(x, *running, config, True)


def _add_torch(bench: Bench, case: Case, x: torch.Tensor) -> None:
    per_channel = case.granularity != "tensor"
    channels = case.size if per_channel else 1
    on = torch.ones(1, dtype=torch.long)
    running_min, running_max = torch.full((channels,), -3.0), torch.full((channels,), 3.0)
    scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    _, quant_min, quant_max = value_range(case)
    axis = 1 if case.granularity == "channel 1" else 0
    add_if_supported(
        bench,
        "torch",
        lambda: torch.fused_moving_avg_obs_fake_quant(
            *(x, on, on, running_min, running_max, scale, zero_point, _AVERAGING_CONSTANT),
            *(int(quant_min), int(quant_max), axis, per_channel, True),
        ),
    )
