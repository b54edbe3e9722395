"""examples/post_training.py, a little of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent


def test_gptq_moves_scores_less_than_rounding(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples" / "post_training.py"), "--epochs", "3"]
    result = subprocess.run(
        [*command, "--only", "rounding to nearest", "GPTQ"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    errors = {(row[0], row[1]): float(row[2]) for row in rows if len(row) == 5 and row[2]}
    for dtype in ("int4", "int3"):
        assert errors[dtype, "GPTQ"] < 0.6 * errors[dtype, "rounding to nearest"]
