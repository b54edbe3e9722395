"""Whole models: where simulators are, and every output, loss, gradient and state, bit for bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.models import MODELS
from coreai_kernels import use_backend

from .conftest import Oracle
from .quantizer_configs import CONFIGS
from .quantizer_runs import RUNS, continue_from, train
from .snapshots import Raised, differences

REFERENCE_TOO = ("default", "floats")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the oracle's process: sums over a batch depend on how torch splits them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def answers(asked_oracle: Oracle, one_thread: None) -> dict[str, Any]:
    """From Apple's package: ``{"runs": {(model, config): log}, "continued": {model: log}}``."""
    ours = {model: train(model, "default") for model in MODELS}
    states = {model: log["trained"]["state"] for model, log in ours.items() if "raised" not in log}
    return asked_oracle.ask("quantizer", {"module": "quantizer_runs", "states": states})


def check(expected: Any, found: Any) -> None:
    """Fail with the first stage that differs: what comes after follows from it."""
    for stage in expected:
        lines = list(differences(expected[stage], found.get(stage), stage))
        if lines:
            pytest.fail("\n".join(lines[:20]), pytrace=False)
    assert list(found) == list(expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_like_the_oracle(model: str, config: str, answers: dict[str, Any]) -> None:
    check(answers["runs"][model, config], train(model, config))


@pytest.mark.parametrize("config", REFERENCE_TOO)
@pytest.mark.parametrize("model", MODELS)
def test_like_the_oracle_on_the_reference(model: str, config: str, answers: dict[str, Any]) -> None:
    with use_backend("reference"):
        check(answers["runs"][model, config], train(model, config))


@pytest.mark.parametrize("model", MODELS)
def test_ours_reads_the_oracles_state(model: str, answers: dict[str, Any]) -> None:
    state = answers["runs"][model, "default"]["trained"]["state"]
    check(answers["continued"][model], continue_from(model, "default", state))


@pytest.mark.parametrize("model", MODELS)
def test_the_oracle_reads_our_state(model: str, answers: dict[str, Any]) -> None:
    """What it did with the state that ours wrote is what it does with its own."""
    continued = answers["continued"][model]
    assert "raised" not in continued, continued
    trained = answers["runs"][model, "default"]["trained"]
    check({"state": trained["state"]}, {"state": continued["state"]})


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
