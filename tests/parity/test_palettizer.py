"""Palettized models: state, weights, outputs, training; state that one package wrote and the other reads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import Oracle
from .palettizer_calls import CALLS
from .palettizer_cases import CASES, TRAINED, Case, build_model
from .palettizer_runs import attempt, call, continue_from, finalize, restore, run, train
from .snapshots import Raised, Snapshot, differences

pytestmark = pytest.mark.usefixtures("one_thread")

# The last bit of a float32 mean of float64 sums depends on the order of the sums.
ULP = 2.0**-23

# Lloyd's iterations end in one of many local minima, so vectors have no unique palette, unless there is one.
UNIQUE = [
    name
    for name, case in CASES.items()
    if case.spec.get("cluster_dim", 1) == 1 or case.weights == "palettized vectors"
]
# Settings of k-means: both packages draw their starts, from generators of their own.
EFFORTS = [name for name in CASES if name.startswith("effort")]
# Vectors of pruned weights that do not divide the channels: Apple's package restores none, its own neither.
UNDIVIDED = [name for name in CASES if "pruned, vectors of 3" in name]
# Rounding to so few decimals that palettes lose entries: ours does not round then.
COARSE = "1 decimals"


@pytest.fixture(scope="module")
def ours(one_thread: None) -> dict[str, Any]:
    return {name: attempt(run, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def answers(asked_oracle: Oracle, ours: dict[str, Any]) -> dict[str, Any]:
    """From Apple's package: what each case shows, what it does with states that ours wrote, trainings."""
    return asked_oracle.ask("palettizer", lambda: job(ours))


def job(ours: dict[str, Any] | None = None) -> dict[str, Any]:
    """What Apple's package is asked, with the states of our models."""
    ours = {name: attempt(run, case) for name, case in CASES.items()} if ours is None else ours
    return {"module": "palettizer_runs", "states": {name: log["state"] for name, log in ours.items()}}


def check_close(expected: Any, found: Any, where: str, tolerance: float) -> None:
    """Same structure, shapes, dtypes and integers; numbers differ by a relative ``tolerance`` at most."""
    if isinstance(expected, Snapshot):
        assert isinstance(found, Snapshot), where
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        one, other = expected.tensor(), found.tensor()
        if not one.is_floating_point() or one.dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(one, other), where
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * _largest(one), msg=where)
    elif isinstance(expected, dict):
        assert sorted(found) == sorted(expected), where
        for key in expected:
            check_close(expected[key], found[key], f"{where}.{key}", tolerance)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            check_close(one, other, f"{where}[{index}]", tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance), where
    else:
        assert found == expected, where


def _largest(tensor: Tensor) -> float:
    return tensor.abs().amax().item() if tensor.numel() and tensor.is_floating_point() else 0.0


def squared_errors(case: Case, result: dict[str, Any]) -> dict[str, float]:
    originals = dict(build_model(case)[0].named_parameters(remove_duplicate=False))
    return {
        name: (values.tensor().double() - originals[name.lstrip(".")].double()).square().sum().item()
        for name, values in result["weights"].items()
    }


@pytest.mark.parametrize("name", [name for name in UNIQUE if name != COARSE])
def test_like_the_oracle(name: str, ours: dict[str, Any], answers: dict[str, Any]) -> None:
    expected, found = answers["cases"][name], ours[name]
    assert not isinstance(expected, Raised), expected
    assert not isinstance(found, Raised), found
    for part in ("state", "weights"):
        check_close(expected[part], found[part], part, ULP)
    for part in ("output", "final"):
        check_close(expected[part], found[part], part, 4 * ULP if CASES[name].dtype == "float32" else 0.01)
    assert found["gradients"] == expected["gradients"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in EFFORTS])
def test_errors_are_never_greater(name: str, ours: dict[str, Any], answers: dict[str, Any]) -> None:
    expected = squared_errors(CASES[name], answers["cases"][name])
    found = squared_errors(CASES[name], ours[name])
    assert found.keys() == expected.keys()
    for weight, error in expected.items():
        assert found[weight] <= error * (1 + 1e-6), weight


def test_equal_effort_leaves_equal_errors(ours: dict[str, Any], answers: dict[str, Any]) -> None:
    total = {"ours": 0.0, "expected": 0.0}
    for name in EFFORTS:
        total["ours"] += sum(squared_errors(CASES[name], ours[name]).values())
        total["expected"] += sum(squared_errors(CASES[name], answers["cases"][name]).values())
    assert total["ours"] < 1.03 * total["expected"]


def test_coarse_rounding_is_left_out(ours: dict[str, Any], answers: dict[str, Any]) -> None:
    """docs/differences.md: Fast mode does not round away a palette."""
    expected = squared_errors(CASES[COARSE], answers["cases"][COARSE])
    found = squared_errors(CASES[COARSE], ours[COARSE])
    assert all(found[weight] < 0.6 * error for weight, error in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_ours_reads_the_oracles_state(name: str, answers: dict[str, Any]) -> None:
    expected = answers["cases"][name]
    found = continue_from(CASES[name], expected["state"])
    check_close(expected["weights"], found["weights"], "weights", 0.0)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_reads_our_state(name: str, ours: dict[str, Any], answers: dict[str, Any]) -> None:
    continued = answers["continued"][name]
    assert not isinstance(continued, Raised), continued
    for weight, values in ours[name]["weights"].items():
        assert torch.equal(values.tensor(), continued["weights"][weight].tensor())


@pytest.mark.parametrize("name", CASES)
def test_prepared_with_the_oracles_state(name: str, answers: dict[str, Any]) -> None:
    expected = answers["cases"][name]
    check_close(expected["weights"], restore(CASES[name], expected["state"])["weights"], "weights", 0.0)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_prepared_with_our_state(name: str, ours: dict[str, Any], answers: dict[str, Any]) -> None:
    restored = answers["restored"][name]
    if name in UNDIVIDED:
        # docs/differences.md: Vectors of pruned weights are restored
        assert isinstance(restored, Raised)
        return
    assert not isinstance(restored, Raised), restored
    check_close(ours[name]["weights"], restored["weights"], "weights", 0.0)


@pytest.mark.parametrize("name", UNIQUE)
def test_finalized_models(name: str, answers: dict[str, Any]) -> None:
    """Dense weights, of the same names; palettized again, they are what they were."""
    if name != COARSE:
        check_close(answers["finalized"][name], finalize(CASES[name]), "finalized", ULP)


@pytest.mark.parametrize("name", TRAINED)
def test_training_and_calibration(name: str, answers: dict[str, Any]) -> None:
    expected, found = answers["trained"][name], train(name)
    assert not isinstance(expected, Raised), expected
    check_close(expected, found, name, 1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, answers: dict[str, Any]) -> None:
    lines = list(differences(answers["calls"][name], call(name)))
    assert not lines, "\n".join(lines)
