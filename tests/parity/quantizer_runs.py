"""Takes whole models through prepare, calibration, training and finalize, and writes down what is seen.

Public names only: the same file runs on both packages.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.zoo import MODELS, Batch, Task, build
from coreai_opt import ExportBackend
from coreai_opt.quantization import Quantizer
from coreai_opt.quantization.spec import QuantizationGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

from .quantizer_configs import CONFIGS
from .runner import captured_log
from .snapshots import Raised, Snapshot, freeze

__all__ = ["RUNS", "continue_from", "places", "quiet", "simulators", "train"]

STEPS, CALIBRATION_BATCHES = 5, 2
RUNS = tuple(product(MODELS, CONFIGS))


class Run:
    """A model with a config, and the batches that it will see."""

    def __init__(self, model: str, config: str) -> None:
        self.task: Task = build(model)
        self.generator = torch.Generator().manual_seed(1)
        example, _ = self.batch()
        self.quantizer = Quantizer(self.task.model, CONFIGS[config](model))
        self.model: nn.Module = self.quantizer.prepare(example)

    def batch(self) -> Batch:
        return self.task.draw(self.generator)

    def evaluate(self) -> Tensor:
        """The output in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            output = self.task.output(self.model(*self.batch()[0]))
        self.model.train()
        return output


@contextmanager
def quiet(seed: int) -> Iterator[None]:
    """The same random numbers (dropout draws some), no warnings, no log."""
    torch.manual_seed(seed)
    with warnings.catch_warnings(), captured_log():
        warnings.simplefilter("ignore")
        yield


def train(model: str, config: str) -> dict[str, Any]:
    """Everything that one can see from preparation to the finalized model."""
    with quiet(0):
        try:
            return dict(_train(Run(model, config)))
        except Exception as error:  # noqa: BLE001 - which exception it is, is what we compare
            return {"raised": Raised.of(error)}


def _train(run: Run) -> Iterator[tuple[str, Any]]:
    yield "places", places(run.model)
    yield "prepared", {"state": freeze(run.model.state_dict()), "modes": modes(run.model)}
    with run.quantizer.calibration_mode():
        outputs = [run.task.output(run.model(*run.batch()[0])) for _ in range(CALIBRATION_BATCHES)]
        seen = {"outputs": outputs, "modes": modes(run.model), "switches": switches(run)}
        yield "calibration", freeze(seen)
    yield "calibrated", {"state": freeze(run.model.state_dict()), "evaluated": freeze(run.evaluate())}
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9)
    with run.quantizer.training_mode():
        for step in range(STEPS):
            yield f"step {step}", freeze(_step(run, optimizer))
    yield "trained", {"state": freeze(run.model.state_dict()), "modes": modes(run.model)}
    yield "evaluated", freeze(run.evaluate())
    finalized = run.quantizer.finalize(backend=ExportBackend.Torch)
    yield "finalized", {"same object": finalized is run.model, "places": places(finalized)}
    yield "finalized output", freeze(run.evaluate())


def _step(run: Run, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    inputs, target = run.batch()
    output = run.task.output(run.model(*inputs))
    loss = run.task.loss(output, target)
    optimizer.zero_grad()
    loss.backward()
    seen = {"output": output, "loss": loss, "gradients": gradients(run.model), "switches": switches(run)}
    optimizer.step()
    run.quantizer.step()
    return seen


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def simulators(model: nn.Module) -> dict[str, FakeQuantizeImplBase]:
    """By name, a shared one under each of its names, in the order of the modules."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, FakeQuantizeImplBase)}


def places(model: nn.Module) -> dict[str, Any]:
    """Where the simulators are, what they are, and which of them are one."""
    found = simulators(model)
    first = {id(simulator): name for name, simulator in reversed(found.items())}
    return {name: {"is": first[id(simulator)]} | description(simulator) for name, simulator in found.items()}


def description(simulator: FakeQuantizeImplBase) -> dict[str, Any]:
    return {
        "dtype": str(simulator.dtype),
        "granularity": granularity(simulator.granularity),
        "calculator": type(simulator.qparams_calculator).__name__,
        "range": (simulator.quant_min, simulator.quant_max),
        "scheme": str(simulator.qscheme),
        "formulation": str(simulator.qformulation),
    }


def granularity(found: QuantizationGranularity) -> str:
    return f"{type(found).__name__}({found.axis}, {getattr(found, 'block_size', None)})"


def switches(run: Run) -> dict[str, tuple[bool, bool]]:
    """Observer and fake quantization of each simulator."""
    return {
        name: (bool(simulator.observer_enabled), bool(simulator.fake_quant_enabled))
        for name, simulator in simulators(run.model).items()
    }


def modes(model: nn.Module) -> dict[str, bool]:
    """Which of the model's own modules are in training mode."""
    ours = (FakeQuantizeImplBase, nn.utils.parametrize.ParametrizationList)
    return {
        name: module.training
        for name, module in model.named_modules()
        if "quantize" not in name and "parametrizations" not in name and not isinstance(module, ours)
    }


def continue_from(model: str, config: str, state: dict[str, Snapshot]) -> dict[str, Any]:
    """Load ``state`` (strictly) into a freshly prepared model; evaluate, and take a training step."""
    with quiet(0):
        try:
            run = Run(model, config)
            run.model.load_state_dict({name: value.tensor() for name, value in state.items()}, strict=True)
            loaded = {"state": freeze(run.model.state_dict()), "evaluated": freeze(run.evaluate())}
            optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05)
            with run.quantizer.training_mode():
                step = freeze(_step(run, optimizer))
        except Exception as error:  # noqa: BLE001 - compared
            return {"raised": Raised.of(error)}
    return loaded | {"step": step}
