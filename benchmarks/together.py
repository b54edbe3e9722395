"""Two hundred small weights in kept launches, as a training step has them, and one tensor of that size."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import NATIVE, Bench, Local
from benchmarks.observe_and_fake_quantize import floor_bytes
from benchmarks.operators import MASK_BYTES
from benchmarks.simulation import FORWARD, TRAINING, Simulation
from coreai_kernels import use_backend

__all__ = ["ONE_TENSOR", "SINGLY", "build", "cases", "layer_shapes"]

ONE_TENSOR, SINGLY, ANEW = "one tensor", "singly", "worked out anew"
# Torch's own operator on lists, and on one tensor, which does nothing but multiply by one.
_LIST_TIMES_ONE, _TENSOR_TIMES_ONE = "list * 1", "one tensor * 1"
# Some 200 layers of the sides below; a multiple of the blocks of 32.
_SIZE = 1376
_SIDES = (64, 96, 128)
_FULL = [("int4", "block 32"), ("int8", "channel 0"), ("int8", "tensor"), ("fp8 e4m3", "channel 0")]
_QUICK = [("int4", "block 32")]


def cases(sweep: Sweep) -> Iterator[Case]:
    sized = replace(sweep, sizes=(_SIZE,))
    for phase in (FORWARD, TRAINING):
        yield from sized.over("together", sweep.select(_FULL, _QUICK), phase=phase, variant="static")


def layer_shapes(elements: int) -> list[tuple[int, int]]:
    """Shapes of small layers, as many as ``elements`` suffice for."""
    shapes: list[tuple[int, int]] = []
    for rows, columns in cycle(product(_SIDES, _SIDES)):
        if rows * columns > elements:
            return shapes
        shapes.append((rows, columns))
        elements -= rows * columns
    return shapes


class _Kept:
    """What a prepared model does with its small weights: make sure of the launches, and call them."""

    def __init__(self) -> None:
        self._known: Any = None

    def __call__(self, simulators: list[Any], weights: list[torch.Tensor]) -> Any:
        from coreai_opt.quantization.spec.kept_launches import KeptLaunches
        from coreai_opt.quantization.spec.together import simulate_together

        outputs = self._known() if self._known is not None and self._known.are_valid() else None
        if outputs is None:
            outputs = simulate_together(simulators, weights)
            pairs = zip(simulators, weights, strict=True)
            places = [({"original": weight}, {"0": simulator}) for simulator, weight in pairs]
            self._known = KeptLaunches(simulators, weights, places)
            assert self._known.members == list(range(len(weights)))
        return outputs


def _backward(outputs: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    # What torch.autograd.backward calls in the end. Before that it looks at each gradient in Python, which
    # takes longer than the simulators' work; in a model the gradients come from other nodes.
    _engine_run_backward(
        tuple(outputs), tuple(grads), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def build(case: Case) -> Bench:
    from coreai_opt.quantization.spec.together import simulate_together

    values, gradients = (make_input(case, seed).view(-1) for seed in (0, 1))
    shapes = layer_shapes(case.numel)
    sizes = [rows * columns for rows, columns in shapes]
    pieces = zip(values.split([*sizes, case.numel - sum(sizes)]), shapes, strict=False)
    weights = [piece.view(shape).clone().requires_grad_() for piece, shape in pieces]
    pieces = zip(gradients.split([*sizes, case.numel - sum(sizes)]), shapes, strict=False)
    grads = [piece.view(shape).clone() for piece, shape in pieces]
    simulators = [Simulation(replace(case, size=_SIDES[0])).module for _ in shapes]

    def step(simulate: Callable[..., Any]) -> None:
        outputs = simulate(simulators, weights)
        if case.phase == TRAINING:
            _backward(outputs, grads)
            for weight in weights:
                weight.grad = None

    whole = Simulation(case)

    def step_on_one_tensor(forward: Callable[[], torch.Tensor]) -> None:
        output = forward()
        if case.phase == TRAINING:
            _backward([output], [whole.grad])
            whole.input.grad = None

    def singly(modules: list[Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [module(tensor) for module, tensor in zip(modules, tensors, strict=True)]

    kept = _Kept()
    floor = floor_bytes(case)
    if case.phase == TRAINING:
        floor += case.numel * (2 * case.element_bytes + MASK_BYTES)
    contenders: dict[str, Any] = {
        NATIVE: lambda: step(kept),
        ANEW: lambda: step(simulate_together),
        SINGLY: lambda: step(singly),
        ONE_TENSOR: lambda: step_on_one_tensor(whole.forward),
        _LIST_TIMES_ONE: lambda: step(lambda _, tensors: torch._foreach_mul(tensors, 1.0)),
        _TENSOR_TIMES_ONE: lambda: step_on_one_tensor(lambda: whole.input * 1.0),
        "reference": Local(lambda: step(kept), lambda: use_backend("reference")),
    }
    return Bench(contenders, floor, max(sizes) * case.element_bytes)
