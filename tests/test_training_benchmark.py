"""The benchmark of training steps, end to end on one model: what it writes, not how fast anything is."""

import functools
import io
import json
import math

import pytest
import torch
from rich.console import Console

from benchmarks.models import training
from benchmarks.models.training_plot import save_plot
from benchmarks.models.training_report import (
    APPLE,
    OURS,
    PLUGIN,
    Result,
    TrainingReport,
    print_report,
    targets,
)
from benchmarks.models.training_step import COMPILED, CONFIGS, EAGER, FLOAT, GRAPH, INT4, TrainingStep
from benchmarks.models.zoo import MANY, MODELS, ONE, build


def result(ours: float, apple: float, model: str = "mlp", config: str = INT4, mode: str = EAGER) -> Result:
    """With a float step of one second and these overheads."""
    overhead = {OURS: ours, APPLE: apple}
    seconds = {package: 1 + value for package, value in overhead.items()}
    return Result(
        model, config, mode, 1, 3, dict.fromkeys(overhead, 1.0), seconds, overhead, same_losses=True
    )


@pytest.fixture(scope="module")
def report() -> TrainingReport:
    options = training.Options(("mlp", MANY, ONE), CONFIGS, rounds=2, sample_seconds=1e-6)
    return training.run(options)


def test_every_config_is_measured(report):
    assert [(r.model, r.config, r.mode) for r in report.results] == [
        *(("mlp", config, mode) for mode in (EAGER, GRAPH) for config in CONFIGS),
        (MANY, INT4, EAGER),
        (ONE, INT4, EAGER),
    ]
    for measured in report.results:
        assert measured.simulators > 0
        assert measured.seconds[OURS] > 0
        assert measured.float_seconds[OURS] > 0
        assert math.isnan(measured.ratio)
        assert measured.same_losses is None
    assert {r.model: r.simulators for r in report.results}[MANY] == 200


def test_json_round_trip_and_schema(report, tmp_path):
    path = tmp_path / "new" / "training.json"
    report.save(path)
    data = json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, which is not JSON
    assert set(data) == {"schema", "machine", "command", "seconds", "results", "targets"}
    assert TrainingReport.load(path) == report
    # The first schema had no modes.
    first = [{key: value for key, value in each.items() if key != "mode"} for each in data["results"]]
    path.write_text(json.dumps(data | {"schema": 1, "results": first}))
    assert {each.mode for each in TrainingReport.load(path).results} == {EAGER}
    path.write_text(json.dumps(data | {"schema": -1}))
    with pytest.raises(ValueError, match="another version"):
        TrainingReport.load(path)


def test_targets():
    rows = targets([result(0.1, 1.0), result(0.4, 1.0), result(9.0, 1.0, MANY), result(2.0, 1.0, ONE)])
    assert [row["reached"] for row in rows] == pytest.approx([0.2, 0.4, 4.5])
    assert [row["met"] for row in rows] == [True, True, False]
    assert rows[1]["where"] == "mlp, int4 weights"


def test_target_of_the_plugin():
    measured = result(0.1, 1.0)
    measured.seconds[PLUGIN] = 1.3 * measured.seconds[OURS]
    (row,) = [row for row in targets([measured]) if "plugin" in row["target"]]
    assert row["reached"] == pytest.approx(1.3)
    assert not row["met"]


def test_graph_mode_has_targets_of_its_own_also_against_apples_compiled():
    rows = targets([result(0.4, 1.0), result(0.1, 1.0, mode=GRAPH), result(0.05, 0.5, mode=COMPILED)])
    reached = {row["target"]: row["reached"] for row in rows}
    assert reached["eager: overhead / Apple's, geometric mean"] == pytest.approx(0.4)
    assert reached["graph: overhead / Apple's, geometric mean"] == pytest.approx(0.1)
    assert reached["compiled graph: overhead / Apple's, geometric mean"] == pytest.approx(0.1)
    assert reached["graph: overhead / Apple's compiled graph's, geometric mean"] == pytest.approx(0.2)


def test_an_overhead_that_cannot_be_seen_is_not_a_gain():
    assert result(-0.5, 1.0).ratio == pytest.approx(0.002)


def test_table_and_plot(report, tmp_path):
    console = Console(width=200, record=True, file=io.StringIO())
    full = TrainingReport(report.machine, "command", 1.0, [*report.results, result(0.1, 1.0, "cnn")])
    print_report(full, console)
    text = console.export_text()
    assert all(word in text for word in ("mlp", "cnn", MANY, "0.100", "same", "geometric mean"))
    save_plot(full, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_steps_train_and_have_a_fingerprint():
    plain, quantized = TrainingStep("transposed", FLOAT), TrainingStep("transposed", INT4)
    assert plain.digest() != quantized.digest()
    assert TrainingStep("mlp", FLOAT).digest() == TrainingStep("mlp", FLOAT).digest()
    first = float(quantized().detach())
    for _ in range(20):
        last = float(quantized().detach())
    assert last < first


def test_graphs_train_and_can_be_compiled(monkeypatch):
    # Without inductor, whose compiler takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = {}
    for mode in (EAGER, GRAPH, COMPILED):
        step = TrainingStep("mlp", INT4, mode)
        assert step.simulators == 3
        torch.manual_seed(0)
        losses[mode] = [float(step().detach()) for _ in range(2)]
    assert losses[GRAPH] == losses[EAGER]
    assert losses[COMPILED] == pytest.approx(losses[GRAPH], rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_same_each_time(name):
    one, other = (build(name) for _ in range(2))
    losses = []
    for task in (one, other):
        torch.manual_seed(0)
        losses.append(task.batch_loss(task.draw(torch.Generator().manual_seed(0))))
    assert torch.equal(*losses)
    losses[0].backward()
    assert any(parameter.grad is not None for parameter in one.model.parameters())


def test_command_line(tmp_path, capsys):
    arguments = ["--models", "mlp", "--quick", "--without-apple", "--configs", INT4, "--modes", GRAPH]
    assert (
        training.main([*arguments, "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
        == 0
    )
    assert "mlp" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["command"].startswith(
        "python -m benchmarks.training"
    )
    assert (tmp_path / "a.png").exists()
    with pytest.raises(SystemExit):
        training.main(["--models", "nothing"])
