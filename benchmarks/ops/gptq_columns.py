"""``gptq_columns``: the inner loop of GPTQ for at most 128 columns, against the loop in torch's operators."""

from collections.abc import Iterator

import torch

import coreai_kernels
from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import NATIVE, Bench

__all__ = ["build", "cases"]

COLUMNS = 128


def cases(sweep: Sweep) -> Iterator[Case]:
    for case in sweep.over("gptq_columns", [("int4", "channel 0")]):
        if case.dtype == "fp32":
            yield case


def build(case: Case) -> Bench:
    columns = make_input(case)[:COLUMNS].contiguous()
    count, rows = columns.shape
    factor = (make_input(case, seed=1)[:count, :count] / 16).tril()
    factor.diagonal().fill_(1.0)
    scale = columns.abs().amax(0, keepdim=True) / 7.5
    groups = [0] * count

    def run(backend: str) -> None:
        with coreai_kernels.use_backend(backend):
            coreai_kernels.gptq_columns(columns, factor, scale, groups=groups, quant_min=-8.0, quant_max=7.0)

    def eager() -> None:
        values, errors = columns.clone(), torch.empty_like(columns)
        for j in range(count):
            rounded = (values[j] / scale[0]).round().clamp(-8, 7) * scale[0]
            errors[j] = (values[j] - rounded) / factor[j, j]
            values[j + 1 :] -= factor[j + 1 :, j, None] * errors[j]

    contenders = {NATIVE: lambda: run("auto"), "torch": eager, "reference": lambda: run("reference")}
    floor = count * rows * 3 * 4
    return Bench(contenders, floor, columns.nbytes, lambda compile_function: compile_function(eager))
