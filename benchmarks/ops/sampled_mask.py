"""``sampled_mask``: forward and backward, against the chain of eager operations."""

from collections.abc import Iterator

import torch

import coreai_kernels
from benchmarks import nncf
from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import NATIVE, Bench
from benchmarks.ops.operators import REFERENCE_UP_TO

__all__ = ["build", "cases"]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probability: torch.Tensor) -> torch.Tensor:
        return (probability > 0.5).to(probability.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("sampled_mask", [("int8", "tensor")])


def build(case: Case) -> Bench:
    weight = make_input(case).requires_grad_()
    grad = make_input(case, seed=1)
    logits = torch.full(weight.shape, 4.6, requires_grad=True)
    draw = torch.tensor(1)

    def train(backend: str) -> None:
        with coreai_kernels.use_backend(backend):
            output = coreai_kernels.sampled_mask(weight, logits, draw, seed=1)
            torch.autograd.grad(output, (weight, logits), grad)

    def eager() -> None:
        u = torch.rand_like(logits)
        mask = _Straight.apply(torch.sigmoid(logits + torch.log(u) - torch.log1p(-u)))
        torch.autograd.grad(weight * mask.to(weight.dtype), (weight, logits), grad)

    contenders = {NATIVE: lambda: train("auto"), "torch": eager}
    if case.dtype == "fp32":
        contenders |= nncf.contender(lambda: nncf.random_mask(weight, grad))
    if case.size <= REFERENCE_UP_TO:
        contenders["reference"] = lambda: train("reference")
    # Forward: weight, logits, output. Backward: gradient, weight, logits, and two gradients.
    floor = case.numel * (5 * case.element_bytes + 3 * 4)
    return Bench(contenders, floor, weight.nbytes, lambda compile_function: compile_function(eager))
