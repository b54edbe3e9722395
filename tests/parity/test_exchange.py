"""State that one package wrote, read by the other."""

from typing import Any

import pytest

from .cases import Case, all_cases
from .conftest import Oracle
from .runner import run_case, run_exchange
from .snapshots import Raised, Snapshot, differences


def last_state(log: list[Any]) -> dict[str, Snapshot] | None:
    """The state at the end of a log; None if something was raised or the simulator disabled itself."""
    if any("raised" in entry for entry in log) or any(entry.get("same_object") for entry in log):
        return None
    states = [entry["state"] for entry in log if "state" in entry]
    return states[-1] if states and any(s.data for s in states[-1].values()) else None


def exchanged() -> list[Case]:
    """Every seventh of the cases that keep a state."""
    cases = [c for c in all_cases() if c.group.startswith(("core", "mixed"))]
    return [c for c in cases if c.spec["qparam_calculator_cls"] != "dynamic"][::7]


@pytest.fixture(scope="module")
def states(oracle_answers: dict[str, Any]) -> dict[str, dict[str, Snapshot]]:
    """States that Apple's package wrote; ours are the same, as the other tests show."""
    found = {case.name: last_state(oracle_answers["cases"][case.name]) for case in exchanged()}
    return {name: state for name, state in found.items() if state}


@pytest.fixture(scope="module")
def continued(states: dict[str, dict[str, Snapshot]], asked_oracle: Oracle) -> dict[str, list[Any]]:
    """What Apple's package does after reading states that ours wrote."""
    cases = {case.name: case for case in exchanged()}
    ours = {name: last_state(run_case(cases[name])) for name in states}
    return asked_oracle.ask("exchange", {"what": "exchange", "states": ours})


def report(expected: dict[str, list[Any]], found: dict[str, list[Any]]) -> None:
    lines_of = {name: list(differences(tuple(log), tuple(found[name]))) for name, log in expected.items()}
    failed = {name: lines for name, lines in lines_of.items() if lines}
    if failed:
        shown = "\n".join("\n    ".join([name, *failed[name][:4]]) for name in list(failed)[:12])
        pytest.fail(f"{len(failed)} of {len(expected)} differ:\n{shown}", pytrace=False)


def test_enough_cases(states: dict[str, dict[str, Snapshot]]) -> None:
    assert len(states) > 150
    assert not any(isinstance(value, Raised) for state in states.values() for value in state.values())


@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "fresh"])
def test_ours_reads_the_oracles_state(
    stepped: bool, backend: str, states: dict[str, dict[str, Snapshot]], continued: dict[str, list[Any]]
) -> None:
    """Into a simulator that has seen another input, and into one fresh from the factory."""
    cases = {case.name: case for case in exchanged()}
    report(continued, {name: run_exchange(cases[name], state, stepped) for name, state in states.items()})


def test_the_oracle_reads_our_state(
    states: dict[str, dict[str, Snapshot]], continued: dict[str, list[Any]]
) -> None:
    expected = {name: log[0]["state"] for name, log in continued.items()}
    report(
        {name: [{"state": state}] for name, state in states.items()},
        {name: [{"state": state}] for name, state in expected.items()},
    )
