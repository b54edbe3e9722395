"""At equal bits, what the search finds moves the outputs no more than one candidate everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    plot = tmp_path / "front.svg"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "mixed_precision.py"), "--epochs", "2", "--plot", str(plot)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("accuracy\n")[1].splitlines()[:7]
    for line in table:
        bits, divergence, _, found_bits, found_divergence, _ = map(float, line[16:].split())
        assert found_bits <= bits
        assert found_divergence <= divergence
    # Not all choices are uniform.
    assert any(float(line[16:].split()[4]) < 0.5 * float(line[16:].split()[1]) for line in table)
    assert plot.read_text().startswith("<svg")
