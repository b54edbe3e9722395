"""Configurations and pruning as in Apple's package: masks, schedules, trained models, errors, checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from .conftest import Oracle
from .oracle import ROOT
from .pruning_calls import CALLS, call
from .pruning_runs import MODELS, prepare, resume, train
from .snapshots import differences, freeze

pytestmark = pytest.mark.usefixtures("one_thread")

# Calls whose answers differ on purpose, and the headings under which docs/differences.md says why.
INTENDED = {
    "int weights": "Inputs that are not floating point are refused",
    "complex weights": "Inputs that are not floating point are refused",
    "sparsity 1.5": "Sparsities outside [0, 1] are refused everywhere",
    "mask sparsity -1": "Sparsities outside [0, 1] are refused everywhere",
    "vector channels": "Channels of a vector are its elements",
    "spec unknown field": "Unknown fields of a specification are errors",
    "type by a shorter name": "Configurations refuse and find more",
    "set name 3": "Configurations refuse and find more",
    "yaml schedule": "Schedules can be written down",
    "model None": "Errors by kind",
    "config dict": "Errors by kind",
    "statistics": "prepare leaves no trace",
    "checkpoint of 0.3.0": "Checkpoints of earlier versions load",
    "prepare with a checkpoint of 0.3.0": "Checkpoints of earlier versions load",
    "schedule with three arguments": "Schedules in the form of 0.3.0 work",
    "finalize a copy": "Finalizing a copy leaves the original whole",
    "failed prepare with a state": "prepare leaves no trace",
    "supported modules": "supported_modules names the modules",
}


def trained_state(model_name: str) -> Any:
    model, pruner, inputs = prepare(model_name, "default")
    train(model, pruner, inputs, 3)
    return freeze(dict(model.state_dict()))


@pytest.fixture(scope="module")
def answers(asked_oracle: Oracle, one_thread: None) -> dict[str, Any]:
    """From Apple's package, see `pruning_calls.answer`."""
    return asked_oracle.ask("pruning", job)


def job() -> dict[str, Any]:
    """What Apple's package is asked, with the states of our models."""
    return {"module": "pruning_calls", "states": {name: trained_state(name) for name in MODELS}}


@pytest.mark.parametrize("name", [name for name in CALLS if name not in INTENDED])
def test_like_the_oracle(name: str, answers: dict[str, Any]) -> None:
    lines = list(differences(answers["calls"][name], call(name)))
    if lines:
        pytest.fail("\n".join(lines[:20]), pytrace=False)


@pytest.mark.parametrize(("name", "title"), INTENDED.items())
def test_intended_differences_are_still_there_and_documented(
    name: str, title: str, answers: dict[str, Any]
) -> None:
    assert f"## {title}\n" in Path(ROOT, "docs", "differences.md").read_text()
    assert any(differences(answers["calls"][name], call(name)))


@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_loads_our_checkpoints(model: str, answers: dict[str, Any]) -> None:
    lines = list(differences(answers["resumed"][model], resume(model, trained_state(model))))
    if lines:
        pytest.fail("\n".join(lines[:20]), pytrace=False)


@pytest.mark.parametrize("model", MODELS)
def test_checkpoints_of_the_oracle_load(model: str, answers: dict[str, Any]) -> None:
    state = answers["calls"][f"run {model} default"]["trained"][2]["state"]
    resumed = resume(model, state)
    assert not any(differences(state, resumed["state"]))


@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on_from_a_checkpoint_of_the_oracle(model: str, answers: dict[str, Any]) -> None:
    """In mid-schedule, bit for bit."""
    log = answers["calls"][f"run {model} ramp"]["trained"]
    ours, pruner, inputs = prepare(model, "ramp")
    ours.load_state_dict({key: value.tensor() for key, value in log[2]["state"].items()})
    lines = list(differences(log[3:], tuple(train(ours, pruner, inputs, 5))))
    if lines:
        pytest.fail("\n".join(lines[:20]), pytrace=False)
