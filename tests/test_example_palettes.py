import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_table_of_palettes() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "digits_palettes.py"), "--epochs", "2"],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for label, size in (("4 bits", "101.5 KiB of 807.2"), ("2 bits", "50.6 KiB of 807.2")):
        row = next(line.split("│")[1:-1] for line in run.stdout.splitlines() if f"│ {label}" in line)
        cells = [cell.strip() for cell in row[1:]]
        assert len(cells) == 5
        assert all(re.fullmatch(r"\d+\.\d\d%", cell) for cell in cells[:4])
        assert cells[4] == size
