import json
from pathlib import Path

import pytest

from benchmarks import core_ai
from benchmarks.core_ai_run import PASSES

pytest.importorskip("coreai_torch", reason="needs the extra coreai")
ORACLE = Path(__file__).parents[1] / ".oracle"
SMALL = ["--layers", "1", "--width", "64", "--rounds", "1", "--threads", "1"]


def test_both_packages_compress_the_same_program(tmp_path, capsys):
    if not ORACLE.is_dir():
        pytest.skip("Apple's package is not installed in .oracle")
    out = tmp_path / "programs.json"
    assert core_ai.main([*SMALL, "--apple", str(ORACLE), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["name"] for row in rows] == list(PASSES)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["apple"]["seconds"] / row["ours"]["seconds"])
    assert "palettes of 4 bits" in capsys.readouterr().out
