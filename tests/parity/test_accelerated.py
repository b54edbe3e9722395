"""Apple's package with the engine under it: what it answers is what it answers alone."""

from typing import Any

import pytest

from .cases import all_cases
from .conftest import Oracle
from .graph_runs import RUNS as GRAPH_RUNS
from .quantizer_runs import RUNS
from .snapshots import differences

GROUPS = sorted({case.group for case in all_cases()})


@pytest.fixture(scope="module")
def table(asked_oracle: Oracle) -> dict[str, Any]:
    return asked_oracle.ask("table", {"what": "table"}, accelerated=True)


@pytest.mark.parametrize("group", GROUPS)
def test_simulators(group: str, table: dict[str, Any], oracle_answers: dict[str, Any]) -> None:
    lines = []
    for case in (each for each in all_cases() if each.group == group):
        expected, found = oracle_answers["cases"][case.name], table["cases"][case.name]
        lines += [f"{case.name}: {line}" for line in differences(tuple(expected), tuple(found))][:1]
    assert not lines, "\n".join(lines[:20])


EAGER = ("quantizer-alone", {"module": "quantizer_answers", "states": {}})
GRAPH = (
    "graph-alone",
    {"module": "graph_runs", "states": {}, "probes": (), "calls": (), "runs": GRAPH_RUNS[:3]},
)


def compare(asked_oracle: Oracle, job: tuple[str, dict[str, Any]], run: Any) -> None:
    expected = asked_oracle.ask(*job)["runs"][run]
    found = asked_oracle.ask(*job, accelerated=True)["runs"][run]
    assert list(found) == list(expected)
    lines = list(differences(expected, found))
    assert not lines, "\n".join(lines[:20])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_models(run: Any, asked_oracle: Oracle) -> None:
    compare(asked_oracle, EAGER, run)


@pytest.mark.parametrize("run", GRAPH[1]["runs"], ids=str)
def test_models_in_graph_mode(run: Any, asked_oracle: Oracle) -> None:
    compare(asked_oracle, GRAPH, run)


@pytest.mark.parametrize("job", [EAGER, GRAPH], ids=["eager", "graph"])
def test_most_calls_run_on_the_engine(job: tuple[str, dict[str, Any]], asked_oracle: Oracle) -> None:
    status = asked_oracle.ask(*job, accelerated=True)["status"]
    assert status["hits"] > 100
    assert "hooks" not in status["fallbacks"]
