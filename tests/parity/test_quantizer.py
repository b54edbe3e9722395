"""Whole models: where simulators are, and every output, loss, gradient and state, bit for bit."""

from typing import Any

import pytest

from benchmarks.models.zoo import MODELS
from coreai_kernels import use_backend

from .conftest import Oracle
from .oracle import ROOT
from .quantizer_calls import CALLS, call
from .quantizer_runs import RUNS, continue_from, train
from .quantizer_scopes import PLACES, place
from .snapshots import Raised, differences

pytestmark = pytest.mark.usefixtures("one_thread")

REFERENCE_TOO = ("default", "floats")
# What differs on purpose, and the headings under which docs/differences.md says why.
RUNS_INTENDED = {("shared", "schedule"): "Schedules reach what the model itself owns"}
INTENDED = {
    "config type by public name": "Configurations refuse and find more",
    "config edges by name": "Configurations refuse and find more",
    "operation dropout": "prepare leaves no trace",
    "calibration in training": "Training goes on after a calibration within it",
    "example a dict": "Inputs by keyword",
    "config a dict": "Errors by kind",
    "config of a module": "Errors by kind",
    "model None": "Errors by kind",
    "more calls than prepared": "Calls of operations are recognised by their place in the source",
    "fewer calls than prepared": "Calls of operations are recognised by their place in the source",
}


@pytest.fixture(scope="module")
def answers(asked_oracle: Oracle, one_thread: None) -> dict[str, Any]:
    """From Apple's package, see `quantizer_answers.answer`."""
    return asked_oracle.ask("quantizer", job)


def job() -> dict[str, Any]:
    """What Apple's package is asked, with the states of our models."""
    ours = {model: train(model, "default") for model in MODELS}
    states = {model: log["trained"]["state"] for model, log in ours.items() if "raised" not in log}
    return {"module": "quantizer_answers", "states": states}


def check(expected: Any, found: Any, model: str = "") -> None:
    """Fail with the first stage that differs: what comes after follows from it.

    Weights that a forward reads several times are simulated once in ours: their gradients are summed before
    clipped elements are set to zero, not after it, and a sum of zeros may have the other sign.
    """
    by_value = model == "shared"
    if "raised" in found and "raised" not in expected:
        pytest.fail(str(found["raised"]), pytrace=False)
    for stage in expected:
        lines = list(differences(expected[stage], found.get(stage), stage, by_value))
        if lines:
            pytest.fail("\n".join(lines[:20]), pytrace=False)
    assert list(found) == list(expected)


@pytest.mark.parametrize(("model", "config"), [run for run in RUNS if run not in RUNS_INTENDED])
def test_like_the_oracle(model: str, config: str, answers: dict[str, Any]) -> None:
    check(answers["runs"][model, config], train(model, config), model)


@pytest.mark.parametrize("config", REFERENCE_TOO)
@pytest.mark.parametrize("model", MODELS)
def test_like_the_oracle_on_the_reference(model: str, config: str, answers: dict[str, Any]) -> None:
    with use_backend("reference"):
        check(answers["runs"][model, config], train(model, config), model)


@pytest.mark.parametrize("model", MODELS)
def test_ours_reads_the_oracles_state(model: str, answers: dict[str, Any]) -> None:
    state = answers["runs"][model, "default"]["trained"]["state"]
    check(answers["continued"][model], continue_from(model, "default", state), model)


@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_reads_our_state(model: str, answers: dict[str, Any]) -> None:
    """What it did with the state that ours wrote is what it does with its own."""
    continued = answers["continued"][model]
    assert "raised" not in continued, continued
    trained = answers["runs"][model, "default"]["trained"]
    check({"state": trained["state"]}, {"state": continued["state"]})


@pytest.mark.parametrize("name", [name for name in PLACES if name not in INTENDED])
def test_places_like_the_oracles(name: str, answers: dict[str, Any]) -> None:
    check(answers["places"][name], place(name))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in INTENDED])
def test_calls_like_the_oracles(name: str, answers: dict[str, Any]) -> None:
    check({"value": answers["calls"][name]}, {"value": call(name)})


@pytest.mark.parametrize("name", [*RUNS_INTENDED, *INTENDED], ids=str)
def test_intended_differences_are_still_there_and_documented(name: Any, answers: dict[str, Any]) -> None:
    heading = (RUNS_INTENDED | INTENDED)[name]
    assert f"## {heading}\n" in (ROOT / "docs" / "differences.md").read_text()
    if name in RUNS_INTENDED:
        expected, found = answers["runs"][name], train(*name)
    elif name in PLACES:
        expected, found = answers["places"][name], place(name)
    else:
        expected, found = answers["calls"][name], call(name)
    assert list(differences(expected, found))


def test_the_runs_cover_what_they_are_meant_to_cover(answers: dict[str, Any]) -> None:
    runs = answers["runs"]
    assert set(runs) == set(RUNS)
    raised = {run for run, log in runs.items() if "raised" in log}
    assert raised == {("shared", "int4_blocks")}
    assert isinstance(runs["shared", "int4_blocks"]["raised"], Raised)
    trained = [log for run, log in runs.items() if run not in raised]
    assert all(log["places"] for log in trained)
    assert all(log["step 0"]["loss"] != log["step 4"]["loss"] for log in trained)
    assert runs["encoder", "default"]["places"] != runs["encoder", "overrides"]["places"]
