import json
from pathlib import Path

import pytest

from benchmarks import clustering, vector_clustering

ORACLE = Path(__file__).parents[1] / ".oracle"


def test_both_packages_are_measured_on_the_same_weights(tmp_path, capsys):
    if not ORACLE.is_dir():
        pytest.skip("Apple's package is not installed in .oracle")
    out = tmp_path / "clustering.json"
    arguments = [
        "--size",
        "64",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--apple",
        str(ORACLE),
        "--json",
        str(out),
    ]
    assert clustering.main(arguments) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["dtype"], row["granularity"]) for row in rows] == list(clustering.WANTED)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["apple"]["seconds"] / row["ours"]["seconds"])
        # The same weights, clustered in the best way by both.
        assert row["error_ratio"] == pytest.approx(1, abs=1e-6)
    assert "float16" in capsys.readouterr().out


def test_ours_alone(tmp_path):
    out = tmp_path / "clustering.json"
    arguments = ["--size", "32", "--rounds", "1", "--threads", "1", "--apple", "none", "--json", str(out)]
    assert clustering.main(arguments) == 0
    rows = json.loads(out.read_text())["results"]
    assert all(row["ours"]["seconds"] > 0 and "apple" not in row for row in rows)


def test_vectors_of_both_packages(tmp_path, capsys):
    if not ORACLE.is_dir():
        pytest.skip("Apple's package is not installed in .oracle")
    out = tmp_path / "vectors.json"
    arguments = ["--sizes", "32", "--dims", "2,4", "--bits", "4", "--seeds", "1", "--threads", "1"]
    arguments += ["--apple", str(ORACLE), "--json", str(out)]
    assert vector_clustering.main(arguments) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["kind"], row["dim"]) for row in rows] == [
        (kind, dim) for kind in vector_clustering.KINDS for dim in (2, 4)
    ]
    # Percents below the errors of a single run of Apple's.
    assert all(-0.3 < row["excess"] < 0.001 for row in rows)
    assert "Of 6 cases" in capsys.readouterr().out


def test_our_vectors_alone(tmp_path):
    out = tmp_path / "vectors.json"
    arguments = ["--sizes", "16", "--dims", "2", "--bits", "2", "--seeds", "2", "--threads", "1"]
    assert vector_clustering.main([*arguments, "--apple", "none", "--json", str(out)]) == 0
    for row in json.loads(out.read_text())["results"]:
        assert "apple" not in row
        # The same in every run.
        assert row["ours"]["best"] == row["ours"]["worst"] > 0
