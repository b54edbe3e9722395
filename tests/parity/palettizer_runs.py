"""Palettizations that both packages carry out: what is seen of each.

Runs on whichever package ``import coreai_opt`` finds, through its public names.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.common import ExportBackend
from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.quantization.spec import QuantizationSpec

from .palettizer_calls import CALLS
from .palettizer_cases import CASES, TRAINED, Case, build_model
from .snapshots import Raised, freeze

__all__ = ["answer", "attempt", "call", "continue_from", "finalize", "restore", "run", "train"]


def new_palettizer(case: Case, model: nn.Module) -> KMeansPalettizer:
    """The palettizer that the case asks for."""
    spec = dict(case.spec)
    if "lut_qspec" in spec:
        spec["lut_qspec"] = QuantizationSpec(**spec["lut_qspec"])
    states = {"weight": PalettizationSpec(**spec), "in_proj_weight": PalettizationSpec(**spec)}
    module_config = ModuleKMeansPalettizerConfig(op_state_spec=states, **case.config)
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=module_config))


def prepare(case: Case) -> tuple[KMeansPalettizer, nn.Module, tuple[Tensor, ...]]:
    """The case's model, prepared."""
    model, inputs = build_model(case)
    palettizer = new_palettizer(case, model)
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if case.sensitive:
            path = str(Path(folder) / "sensitivities.pt")
            torch.save(_sensitivities(model), path)
        return palettizer, palettizer.prepare(inputs, path), inputs


def _sensitivities(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        found[f"{path}.parametrizations.{attribute}.original"] = torch.rand(
            parameter.shape, generator=generator
        )
    return found


def palettized(model: nn.Module) -> dict[str, Tensor]:
    """The values of the palettized weights, by name."""
    return {
        f"{name}.{attribute}": getattr(module, attribute)
        for name, module in model.named_modules()
        if hasattr(module, "parametrizations")
        for attribute in module.parametrizations
    }


def run(case: Case) -> dict[str, Any]:
    """State, weights and output after preparation; which parameters get gradients; the final output."""
    palettizer, model, inputs = prepare(case)
    result = freeze({"state": model.state_dict(), "weights": palettized(model), "output": model(*inputs)})
    with palettizer.training_mode():
        model(*inputs).float().square().sum().backward()
        palettizer.step()
    gradients = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    final = palettizer.finalize(backend=ExportBackend.Torch).eval()
    return result | freeze({"gradients": gradients, "final": final(*inputs)})


def train(name: str) -> dict[str, Any]:
    """Losses, switches and palettes over steps of training with a schedule, then calibration."""
    case = CASES[name]
    palettizer, model, inputs = prepare(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.ones(1)
    log: list[Any] = []
    with palettizer.training_mode():
        for _ in range(4):
            loss = (model(*inputs) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            palettizer.step()
            log.append((loss.item(), freeze(palettized(model))))
    with tempfile.TemporaryDirectory() as folder:
        measured, saved = Path(folder) / "measured.pt", Path(folder) / "saved.pt"
        with palettizer.calibration_mode(loss_fn=_loss, sensitivity_path=str(measured)) as helper:
            for scale in (1, 2):
                helper.step(model(inputs[0] * scale), target)
        palettizer.save_sensitivities(str(saved))
        files = {path.stem: torch.load(path) for path in (measured, saved)}
    return {"steps": tuple(log), "weights": freeze(palettized(model)), "files": freeze(files)}


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def continue_from(case: Case, state: dict[str, Any]) -> Any:
    """The weights and the output of the case's model after loading ``state`` (strictly)."""
    _, model, inputs = prepare(case)
    model.load_state_dict({name: snapshot.tensor() for name, snapshot in state.items()}, strict=True)
    return freeze({"weights": palettized(model), "output": model.eval()(*inputs)})


def restore(case: Case, state: dict[str, Any], without: tuple[str, ...] = ()) -> Any:
    """The weights and the output of a model that is prepared with ``state``, whatever weights it had."""
    model, inputs = build_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.ones_like(parameter))
    state = {name: value.tensor() for name, value in state.items() if not name.endswith(without)}
    new_palettizer(case, model).prepare(inputs, state_dict=state)
    return freeze({"weights": palettized(model), "output": model.eval()(*inputs)})


def finalize(case: Case) -> Any:
    """The state of the finalized model, and its weights after another palettization."""
    palettizer, model, inputs = prepare(case)
    state = palettizer.finalize(backend=ExportBackend.Torch).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    new_palettizer(case, model).prepare(inputs)
    return freeze({"state": before, "again": palettized(model)})


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the exception that it raises."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - which exception it is, is what we compare
        return Raised.of(error)


def call(name: str) -> Any:
    """The value or the exception of one entry of `palettizer_calls.CALLS`."""
    return attempt(lambda: freeze(CALLS[name]()))


def answer(job: dict[str, Any]) -> Any:
    """What each case shows, what the cases do after loading the states in the job, and trainings."""
    return {
        "cases": {name: attempt(run, CASES[name]) for name in job.get("cases", CASES)},
        "continued": {
            name: attempt(continue_from, CASES[name], state) for name, state in job["states"].items()
        },
        "restored": {name: attempt(restore, CASES[name], state) for name, state in job["states"].items()},
        "finalized": {name: attempt(finalize, CASES[name]) for name in job.get("cases", CASES)},
        "trained": {name: attempt(train, name) for name in job.get("trained", TRAINED)},
        "calls": {name: call(name) for name in job.get("calls", CALLS)},
    }
