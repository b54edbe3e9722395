import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "digits_qat.py"


def _run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: tests run side by side, and threads that wait for each other would be the slower way.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("COREAI_KERNELS_BACKEND", None)
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out), *arguments],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def _row(table: str, label: str) -> list[str]:
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines())
    return next(row[1:] for row in rows if row and row[0] == label)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str, str]]:
    results = []
    for name in ("first", "second"):
        out = tmp_path_factory.mktemp("digits") / name
        run = _run(out)
        assert run.returncode == 0, run.stderr
        results.append((out, run.stdout, run.stderr))
    return results


@pytest.mark.slow
def test_table_reports_every_model(runs):
    _, table, _ = runs[0]
    accuracies = _row(table, "test accuracy")
    assert len(accuracies) == 7
    assert all(re.fullmatch(r"\d+\.\d\d%", cell) for cell in accuracies)
    assert float(accuracies[0].rstrip("%")) > 20  # a few steps beat chance, 10 %
    assert accuracies[2] == accuracies[3]
    assert "of both backends are identical" in table
    assert "equal the simulated and the pruned ones bit for bit" in table


@pytest.mark.slow
def test_table_counts_bytes_of_the_packed_model(runs):
    _, table, _ = runs[0]
    full, *packed = (int(cell.replace(",", "")) for cell in _row(table, "model size (bytes)"))
    *packed, in_graph, unstructured, two_of_four = packed
    assert len(set(packed)) == 1
    # A mean and its input share their scale.
    assert in_graph == packed[0] - 4
    # int4 weights in blocks of 64: the two convolutions (the first in int8), the block, the classifier.
    int4 = 64 * 128 * 9 + 4 * 128 * 128 + 2 * 128 * 256 + 10 * 128
    weights = _row(table, "packed weights")
    assert weights[:5] == ["–"] + [f"{int4 // 2 + 64 * 9:,}"] * 4
    # Of the same weights but the first layer's: float32 values of those that stay, and a bit for each.
    assert weights[5:] == [f"{int4 // 4 * 4:,}", f"{int4 // 2 * 4:,}"]
    assert _row(table, "their scales, or masks")[5:] == [f"{int4 // 8:,}"] * 2
    assert unstructured < two_of_four < full
    assert full / packed[0] > 6


@pytest.mark.slow
def test_pruned_weights_are_zero(runs):
    _, table, _ = runs[0]
    zeros = _row(table, "weights that are zero")
    assert zeros[:5] == ["–"] * 5
    # All weights but 576 of 206,656 are pruned, to exactly three quarters and to exactly half.
    assert zeros[5:] == ["74.8%", "49.9%"]


@pytest.mark.slow
def test_palettes_are_measured_in_each_way(runs):
    _, tables, _ = runs[0]
    for label, size in (("4 bits", "101.5 KiB of 807.2"), ("2 bits", "50.6 KiB of 807.2")):
        *accuracies, stored = _row(tables, label)
        assert len(accuracies) == 4
        assert all(re.fullmatch(r"\d+\.\d\d%", cell) for cell in accuracies)
        assert stored == size


@pytest.mark.slow
def test_table_measures_steps(runs):
    _, table, _ = runs[0]
    times = _row(table, "median step time (ms)")
    assert times[1] == "–"
    assert all(float(times[column]) > 0 for column in (0, 2, 3, 4, 5, 6))
    memory = _row(table, "peak memory of a step (MiB)")
    assert float(memory[0]) < float(memory[2]) < float(memory[3])


@pytest.mark.slow
def test_report_is_a_picture(runs):
    image = pytest.importorskip("matplotlib.image").imread(runs[0][0] / "report.png")
    height, width, _ = image.shape
    assert height > 800
    assert width > 800
    assert image[..., :3].std() > 0.05  # not blank


@pytest.mark.slow
def test_two_runs_are_the_same(runs):
    losses = [json.loads((out / "losses.json").read_text()) for out, _, _ in runs]
    assert losses[0] == losses[1]
    assert losses[0]["fused"] == losses[0]["reference"]
    assert all(math.isfinite(loss) for run in losses[0].values() for loss in run)
    for label in ("test accuracy", "test loss", "model size (bytes)", "weights that are zero"):
        assert _row(runs[0][1], label) == _row(runs[1][1], label)


@pytest.mark.slow
def test_standard_error_holds_progress_only(runs):
    _, _, errors = runs[0]
    assert all(title in errors for title in ("float32", "QAT fused", "QAT reference", "QAT graph"))
    assert "arning" not in errors
    assert "USDT" not in errors


@pytest.mark.slow  # for its imports
def test_differing_losses_end_the_script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from digits_qat import History, require_identical

    runs = {"fused": History([3.0, 2.0, 1.0]), "reference": History([3.0, 2.5, 1.5])}
    with pytest.raises(SystemExit, match=r"step 1 has loss 2.0 fused and 2.5 on reference"):
        require_identical(runs, {})
