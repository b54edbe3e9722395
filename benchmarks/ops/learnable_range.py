"""``learnable_range``: forward and backward, against the chain of eager operations."""

from collections.abc import Iterator

import torch

import coreai_kernels
from benchmarks import nncf
from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import NATIVE, Bench
from benchmarks.ops.operators import REFERENCE_UP_TO

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("learnable_range", [("int8", "tensor"), ("int8", "channel 0")])


def build(case: Case) -> Bench:
    x = make_input(case).requires_grad_()
    grad = make_input(case, seed=1)
    grid = [size // block for size, block in zip(x.shape, case.block_size, strict=True)]
    span = torch.full(grid, 3.0, requires_grad=True)

    def train(backend: str) -> None:
        with coreai_kernels.use_backend(backend):
            output = coreai_kernels.learnable_range(
                x, span, block_size=case.block_size, level_low=-128, level_high=127
            )
            torch.autograd.grad(output, (x, span), grad)

    def eager() -> None:
        step = span / 127
        position = x / step
        rounded = position + (position.round() - position).detach()
        output = (rounded.clamp(-128, 127) * step).to(x.dtype)
        torch.autograd.grad(output, (x, span), grad)

    contenders = {NATIVE: lambda: train("auto"), "torch": eager}
    if case.dtype == "fp32":
        contenders |= nncf.contender(lambda: nncf.symmetric_range(x, span, grad))
    if case.size <= REFERENCE_UP_TO:
        contenders["reference"] = lambda: train("reference")
    # Forward: input and output. Backward: gradient, input, gradient to the input.
    return Bench(
        contenders,
        5 * case.numel * case.element_bytes,
        x.nbytes,
        lambda compile_function: compile_function(eager),
    )
