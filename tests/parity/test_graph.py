"""Graph mode: where quantizers are, and every output, loss, gradient and state, bit for bit."""

import functools
from typing import Any

import pytest

from .conftest import Oracle
from .graph_calls import CALLS, call
from .graph_runs import PROBES, RUNS, UPSTREAM, continue_from, prepared, run
from .oracle import ROOT
from .snapshots import differences

pytestmark = pytest.mark.usefixtures("one_thread")

# What differs on purpose, and the headings under which docs/differences.md says why.
MODULES, NUMBERS, TIES = (
    "Prepared graphs are modules like others",
    "Graph mode keeps the numbers of batch norms and dropouts",
    "Caches and declined boundaries among quantized activations",
)
INTENDED = {
    "a cache among quantized activations": TIES,
    "boundary declined at a tie": TIES,
    "batch norm without parameters": "Batch norms without parameters are fused, too",
    "batch norm without statistics": "Batch norms without parameters are fused, too",
    "finalized twice": "Finalizing a graph leaves the prepared one as it is",
    "calibration of a copy": MODULES,
    "dropout of channels in evaluation": MODULES,
    "switch of the whole graph": MODULES,
    "numbers of batch norms and dropouts": NUMBERS,
}
# Apple's package does not prepare it.
RUNS_INTENDED = {("zoo shared", "default"): "Weights that are read as they are and transposed"}
CONTINUED = tuple(
    (name, "default")
    for name in (
        *("residual", "transposed", "bert", "llama", "tied", "shared"),
        *("zoo convolutions", "zoo shared, once"),
    )
)


JOB = {"module": "graph_runs"}
CALLS_JOB = JOB | {"probes": tuple(PROBES), "calls": tuple(CALLS)}

ours = functools.cache(run)


@pytest.fixture(scope="module")
def answers(asked_oracle: Oracle) -> dict[str, Any]:
    """From Apple's package, of probes and calls: see `graph_runs.answer`."""
    return asked_oracle.ask("graph-calls", CALLS_JOB)


@pytest.fixture(scope="module")
def trained(asked_oracle: Oracle) -> dict[str, Any]:
    """The same of runs, and of what follows from our states. Another job, for another worker to wait for."""
    return asked_oracle.ask("graph-runs", runs_job)


def runs_job() -> dict[str, Any]:
    """What Apple's package is asked of runs, with the states of our models."""
    states = {each: ours(*each)["trained"]["state"] for each in CONTINUED}
    return JOB | {"runs": RUNS, "states": states}


def check(expected: Any, found: Any) -> None:
    """Fail with the first stage that differs: what comes after follows from it."""
    if "raised" in found and "raised" not in expected:
        pytest.fail(str(found["raised"]), pytrace=False)
    for stage in expected:
        # With the stage's name as a key: below "state", zeros are equal whatever their sign.
        lines = list(differences({stage: expected[stage]}, {stage: found.get(stage)}))
        if lines:
            pytest.fail("\n".join(lines[:20]), pytrace=False)
    assert list(found) == list(expected)


@pytest.mark.parametrize("name", PROBES)
def test_quantizers_are_where_the_oracle_has_them(name: str, answers: dict[str, Any]) -> None:
    check(answers["probes"][name], prepared(name))


@pytest.mark.parametrize("each", [each for each in RUNS if each not in RUNS_INTENDED], ids=str)
def test_models_train_like_the_oracles(each: Any, trained: dict[str, Any]) -> None:
    check(trained["runs"][each], ours(*each))


@pytest.mark.parametrize("model", UPSTREAM)
def test_dropouts_of_attention_are_switched_unless_told_otherwise(
    model: str, trained: dict[str, Any]
) -> None:
    """Bit for bit the oracle's with `strict_upstream`, see above; without, only where a dropout shows."""
    assert f"## {MODULES}\n" in (ROOT / "docs" / "differences.md").read_text()
    expected, found = trained["runs"][model, "default"], run(model, "default", upstream=False)
    assert not list(differences(expected["places"], found["places"]))
    assert list(differences(expected["prepared"], found["prepared"]))


@pytest.mark.parametrize("each", RUNS_INTENDED, ids=str)
def test_what_the_oracle_cannot_prepare_trains(each: Any, trained: dict[str, Any]) -> None:
    assert f"## {RUNS_INTENDED[each]}\n" in (ROOT / "docs" / "differences.md").read_text()
    assert "raised" in trained["runs"][each]
    found = ours(*each)
    assert "raised" not in found, found["raised"]
    assert found["step 0"]["loss"] != found["step 4"]["loss"]


@pytest.mark.parametrize("each", CONTINUED, ids=str)
def test_ours_continues_from_the_oracles_state(each: Any, trained: dict[str, Any]) -> None:
    state = trained["runs"][each]["trained"]["state"]
    check(trained["continued"][each], continue_from(*each, state))


@pytest.mark.parametrize("each", CONTINUED, ids=str)
def test_the_oracle_continues_from_our_state(each: Any, trained: dict[str, Any]) -> None:
    continued = trained["continued"][each]
    assert "raised" not in continued, continued
    check({"state": ours(*each)["trained"]["state"]}, {"state": continued["state"]})


@pytest.mark.parametrize("name", [name for name in CALLS if name not in INTENDED])
def test_calls_like_the_oracles(name: str, answers: dict[str, Any]) -> None:
    assert not list(differences(answers["calls"][name], call(name)))


@pytest.mark.parametrize("name", INTENDED)
def test_intended_differences_are_still_there_and_documented(name: str, answers: dict[str, Any]) -> None:
    assert f"## {INTENDED[name]}\n" in (ROOT / "docs" / "differences.md").read_text()
    assert list(differences(answers["calls"][name], call(name)))


def test_the_runs_cover_what_they_are_meant_to_cover(trained: dict[str, Any]) -> None:
    runs = trained["runs"]
    assert {each for each, log in runs.items() if "raised" in log} == set(RUNS_INTENDED)
    logs = [log for each, log in runs.items() if each not in RUNS_INTENDED]
    assert all(log["places"] for log in logs)
    assert all(log["step 0"]["loss"] != log["step 4"]["loss"] for log in logs)


def test_the_probes_are_prepared(answers: dict[str, Any]) -> None:
    assert not [name for name, log in answers["probes"].items() if "raised" in log]
