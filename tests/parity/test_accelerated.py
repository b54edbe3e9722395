"""Apple's package with the engine under it: what it answers is what it answers alone."""

import functools
from pathlib import Path
from typing import Any

import pytest

from . import (
    oracle,
    test_export,
    test_graph,
    test_palettizer,
    test_palettizer_older,
    test_pruning,
    test_quantizer,
)
from .cases import all_cases
from .conftest import Oracle
from .graph_calls import CALLS as GRAPH_CALLS
from .graph_runs import RUNS as GRAPH_RUNS
from .palettizer_cases import CASES as PALETTES
from .palettizer_cases import TRAINED
from .pruning_calls import CALLS as PRUNING_CALLS
from .quantizer_calls import CALLS
from .quantizer_runs import RUNS
from .quantizer_scopes import PLACES
from .snapshots import differences
from .test_palettizer import COARSE, ULP, UNIQUE, check_close

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


def test_what_is_left_to_apples_methods(table: dict[str, Any]) -> None:
    """No other reasons than what the cases bring about on purpose: neither calibration nor dynamic ranges."""
    assert table["status"]["fallbacks"].keys() <= {
        *("first observation", "no elements", "fixed range", "block size"),
        *("state of another shape", "running range of another dtype"),
        *("float64", "int64", "bool", "complex64"),
        *("methods", "calculator"),  # of subclasses, which some calls make
    }


# A part of the palettes: the clustering of the others goes the same ways.
CLUSTERED = [name for name in UNIQUE if name != COARSE][::3]
GRAPHS = GRAPH_RUNS[:3]
# What the package is asked with the engine under it. Alone it has been asked that, and more, for other tests.
JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "quantizer": (test_quantizer.job, {"module": "quantizer_answers", "states": {}}),
    "graph-calls": (test_graph.CALLS_JOB, test_graph.JOB | {"calls": tuple(GRAPH_CALLS)}),
    "graph-runs": (test_graph.runs_job, test_graph.JOB | {"runs": GRAPHS}),
    "pruning": (test_pruning.job, {"module": "pruning_calls", "states": {}}),
    "palettizer": (
        test_palettizer.job,
        {"module": "palettizer_runs", "states": {}, "cases": CLUSTERED, "trained": TRAINED[:2], "calls": ()},
    ),
    "export": (test_export.JOB, test_export.JOB),
}


# Specifications show the names of their classes.
NAMES = (
    "expected '_MagnitudePruneImpl', got 'FusedMagnitudePrune'",
    "expected '_DefaultFakeQuantizeImpl', got 'FusedFakeQuantize'",
)


@pytest.fixture(scope="module")
def ask(asked_oracle: Oracle, one_thread: None) -> Any:
    """``ask(name)``: the two answers to a job, alone and accelerated."""

    @functools.lru_cache(maxsize=1)
    def both(name: str) -> tuple[Any, Any]:
        alone, accelerated = JOBS[name]
        return asked_oracle.ask(name, alone), asked_oracle.ask(name, accelerated, accelerated=True)

    return both


def compare(answers: tuple[Any, Any], part: str, name: Any) -> None:
    expected, found = (answer[part][name] for answer in answers)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
    lines = [line for line in differences(expected, found) if not line.endswith(NAMES)]
    assert not lines, "\n".join(lines[:20])


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_models(run: Any, ask: Any) -> None:
    compare(ask("quantizer"), "runs", run)


@pytest.mark.parametrize("name", PLACES)
def test_places_of_simulators(name: str, ask: Any) -> None:
    compare(ask("quantizer"), "places", name)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, ask: Any) -> None:
    compare(ask("quantizer"), "calls", name)


@pytest.mark.parametrize("run", GRAPHS, ids=str)
def test_models_in_graph_mode(run: Any, ask: Any) -> None:
    compare(ask("graph-runs"), "runs", run)


@pytest.mark.parametrize("name", GRAPH_CALLS)
def test_calls_in_graph_mode(name: str, ask: Any) -> None:
    compare(ask("graph-calls"), "calls", name)


@pytest.mark.parametrize("job", ["quantizer", "graph-runs"])
def test_most_calls_run_on_the_engine(job: str, ask: Any) -> None:
    status = ask(job)[1]["status"]
    assert status["hits"] > 100
    assert "hooks" not in status["fallbacks"]


@pytest.mark.parametrize("name", PRUNING_CALLS)
def test_pruning(name: str, ask: Any) -> None:
    compare(ask("pruning"), "calls", name)


@pytest.mark.parametrize("name", CLUSTERED)
def test_palettes(name: str, ask: Any) -> None:
    """Means of clusters may differ in their last bit, which depends on the order of a sum."""
    expected, found = ask("palettizer")
    for part in ("state", "weights"):
        check_close(expected["cases"][name][part], found["cases"][name][part], part, ULP)
    tolerance = 4 * ULP if PALETTES[name].dtype == "float32" else 0.01
    for part in ("output", "final"):
        check_close(expected["cases"][name][part], found["cases"][name][part], part, tolerance)
    check_close(expected["finalized"][name], found["finalized"][name], "finalized", ULP)


@pytest.mark.parametrize("name", TRAINED[:2])
def test_palettized_models_train(name: str, ask: Any) -> None:
    expected, found = ask("palettizer")
    check_close(expected["trained"][name], found["trained"][name], name, 1e-5)


@pytest.mark.parametrize("backend", test_export.BACKENDS)
@pytest.mark.parametrize("name", test_export.CASES)
def test_exported_models(name: str, backend: str, ask: Any) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    expected, found = (answer[name, backend] for answer in ask("export"))
    if "palettes" in name or "scale" in name:
        check_close(expected, found, name, ULP)
    else:
        assert not list(differences(expected, found))


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A part of the table, and of models, from 0.3.0: alone, and with the engine under it."""
    if not list(test_palettizer_older.FOLDER.glob(f"coreai_opt-{test_palettizer_older.VERSION}.dist-info")):
        pytest.skip(test_palettizer_older.INSTALL)
    folder = tmp_path_factory.mktemp("older")
    job = {"module": "older_runs", "keep_traces": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "FOLDER", Path(test_palettizer_older.FOLDER))
        return [oracle.ask(job, folder, accelerated) for accelerated in (False, True)]


def test_release_0_3_0(older: list[Any]) -> None:
    alone, accelerated = older
    lines = [line for part in ("cases", "runs") for line in differences(alone[part], accelerated[part])]
    assert not lines, "\n".join(lines[:20])
    assert accelerated["status"]["hits"] > 20
    assert "hooks" not in accelerated["status"]["fallbacks"]
