"""The whole simulator: a module's forward, and forward and backward, observers on; against Apple's package.

Outputs and gradients are allocated by each call, as in training.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.apple import Apple, AppleError
from benchmarks.cases import BLOCK_SCALED, GRANULARITIES, INT_FORMATS, Case, Sweep, make_input
from benchmarks.harness import MULTIPLY, NATIVE, Bench, Contender, Local, add_if_supported
from benchmarks.ops.observe_and_fake_quantize import floor_bytes
from benchmarks.ops.operators import MASK_BYTES, REFERENCE_UP_TO
from benchmarks.simulation import FORWARD, TRAINING, Simulation
from coreai_kernels import use_backend

__all__ = ["PLUGIN", "Suite", "add_apple"]

PLUGIN = "plugin"

_FULL = [
    *((fmt, granularity) for fmt in INT_FORMATS for granularity in GRANULARITIES),
    *(
        (fmt, granularity)
        for fmt in ("fp8 e4m3", "int6", "mxint8")
        for granularity in ("tensor", "channel 0", "block 32")
    ),
    *(pair for pair in BLOCK_SCALED if pair[0] != "mxint8"),
]
_QUICK = [("int4", "block 32"), ("int8", "tensor"), ("int8", "channel 0"), ("fp8 e4m3", "channel 0")]
_ACTIVATIONS = [("int8", "tensor")]
# Above this size fingerprints take long.
_CHECKED_UP_TO = 1024


@dataclass(frozen=True)
class Suite:
    """The simulator's cases, with Apple's package among the contenders if there is one, and the plugin."""

    apple: Apple | None
    plugin: Apple | None = None

    def cases(self, sweep: Sweep) -> Iterator[Case]:
        weights = sweep.select(_FULL, _QUICK)
        for variant, combinations in (("static", weights), ("moving_average", _ACTIVATIONS)):
            for phase in (FORWARD, TRAINING):
                yield from sweep.over("simulator", combinations, phase=phase, variant=variant)

    def build(self, case: Case) -> Bench:
        simulation = Simulation(case)
        fingerprint = simulation.digest() if case.size <= _CHECKED_UP_TO else ""
        floor = floor_bytes(case)
        if case.phase == TRAINING:
            floor += case.numel * (2 * case.element_bytes + MASK_BYTES)
        contenders: dict[str, Contender] = {NATIVE: simulation.call(case.phase), MULTIPLY: _product(case)}
        if case.size <= REFERENCE_UP_TO:
            reference = Simulation(case)
            contenders["reference"] = Local(reference.call(case.phase), lambda: use_backend("reference"))
        bench = Bench(contenders, floor, simulation.input.nbytes, lambda compiler: _compiled(case, compiler))
        if case.variant == "moving_average":
            _add_torch(bench, case)
        if self.apple is not None:
            add_apple(bench, case, self.apple, fingerprint)
        if self.plugin is not None:
            add_apple(bench, case, self.plugin, fingerprint, PLUGIN)
        return bench


@dataclass(frozen=True)
class _InWorker:
    apple: Apple
    phase: str

    def sample(self, calls: int, *, untimed_call: bool) -> float:
        return self.apple.sample(self.phase, calls, untimed_call=untimed_call)


def add_apple(bench: Bench, case: Case, apple: Apple, fingerprint: str, name: str = "apple") -> None:
    """Let Apple's package join, with a note if its results have another fingerprint."""
    try:
        its_fingerprint = apple.prepare(case, with_digest=bool(fingerprint))
    except AppleError as error:
        bench.notes.append(f"{name}: {str(error).splitlines()[-1]}")
        return
    if its_fingerprint != fingerprint:
        bench.notes.append(f"{name}: output or gradient differ from ours")
    bench.contenders[name] = _InWorker(apple, case.phase)
    others = bench.release

    def release() -> None:
        others()
        apple.release()

    bench.release = release


def _product(case: Case) -> Contender:
    """torch's product with one: what an operator costs that reads, writes and has a gradient, no more."""
    x, grad = make_input(case).requires_grad_(), make_input(case, seed=1)

    def step() -> None:
        output = x * 1.0
        if case.phase == TRAINING:
            output.backward(grad)
            x.grad = None

    return step


def _compiled(case: Case, compiler: Callable[..., Any]) -> Contender:
    simulation = Simulation(case)
    simulation.module = compiler(simulation.module)
    return Local(simulation.call(case.phase), lambda: use_backend("reference"))


def _add_torch(bench: Bench, case: Case) -> None:
    """torch's own module, which does the same for 8-bit integers per tensor."""
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

    module = FusedMovingAvgObsFakeQuantize(
        observer=MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )
    x, grad = make_input(case).requires_grad_(), make_input(case, seed=1)

    def step() -> None:
        output = module(x)
        if case.phase == TRAINING:
            output.backward(grad)
            x.grad = None

    add_if_supported(bench, "torch", step)
