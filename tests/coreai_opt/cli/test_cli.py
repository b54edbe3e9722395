"""The commands do what they say, write JSON, and end with a status that scripts can use."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from coreai_opt._cli import main
from coreai_opt.palettization import KMeansPalettizerConfig
from coreai_opt.quantization import QuantizerConfig

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), (torch.randn(4, 32),)

def only_a_model():
    return nn.ReLU()

def inputs_in_a_list():
    return nn.ReLU(), [torch.ones(1)]

class Scaled(nn.Linear):
    def forward(self, x, *, scale):
        return super().forward(x) * scale

def talkative():
    print("building")
    return build()

def by_keyword():
    return Scaled(32, 8), {"x": torch.randn(4, 32), "scale": 2.0}

def not_finite():
    return nn.Sequential(nn.Linear(32, 8), nn.Hardtanh(), Infinite()), (torch.randn(4, 32),)

class Infinite(nn.Module):
    def forward(self, x):
        return x * float("inf")

def broken():
    raise RuntimeError("no weights on this machine")
"""
WEIGHT_ONLY = """
quantization_config:
  execution_mode: eager
  global_config:
    op_state_spec: {weight: {dtype: int8}}
    op_input_spec: null
    op_output_spec: null
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "command_models.py").write_text(MODELS)
    (tmp_path / "int8.yaml").write_text(WEIGHT_ONLY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("command_models", None)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("inspect", "search", "export", "report", "doctor"):
        assert command in text
        assert main([command, "--help"]) == 0
    assert "Exit status" in text


def test_inspect(capsys: pytest.CaptureFixture[str]):
    found = output(capsys, "inspect", "command_models:build", "--json", "--compressor", "quantizer")
    assert [(module["module"], [op["name"] for op in module["ops"]]) for module in found["modules"]] == [
        ("", []),
        ("0", ["0.linear"]),
        ("1", []),
        ("2", ["2.linear"]),
    ]
    assert found["modules"][1]["ops"][0]["states"] == ["0.weight", "0.bias"]
    assert main(["inspect", "command_models:build", "--mode", "graph"]) == 0
    assert "◆ linear_1 [linear]" in capsys.readouterr().out


def test_search_writes_what_its_configurations_give(capsys: pytest.CaptureFixture[str], folder: Path):
    found = output(
        capsys,
        *("search", "command_models:build", "--bits-per-weight", "6", "--json", "--metric", "kl"),
        *("--csv", "rows.csv", "--plot", "front.svg", "--configs", "configs", "--state", "state.json"),
    )
    assert found["bits_per_weight"] <= 6
    assert (folder / "front.svg").read_text().startswith("<svg")
    assert len((folder / "rows.csv").read_text().splitlines()) == len(found["measurements"]) + 1
    kinds = {"palettization": "--palettize", "quantization": "--quantize", "pruning": "--prune"}
    written = sorted(path.stem for path in (folder / "configs").iterdir())
    arguments = [part for kind in written for part in (kinds[kind], f"configs/{kind}.yaml")]
    page = output(capsys, "report", "command_models:build", "page.html", "--json", *arguments)
    assert page["model"]["bits_per_weight"] == pytest.approx(found["bits_per_weight"])


def test_report_and_export(capsys: pytest.CaptureFixture[str], folder: Path):
    assert main(["report", "command_models:build", "page.html", "--quantize", "int8.yaml"]) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert (folder / "page.html").read_text().startswith("<!DOCTYPE html>")
    found = output(capsys, "export", "command_models:build", "net.pt2", "--quantize", "int8.yaml", "--json")
    assert found["path"] == "net.pt2"
    assert found["difference"] < 1e-5
    assert found["size"] > 0
    assert (folder / "net.pt2").exists()


def test_json_is_all_there_is_on_standard_output(capsys: pytest.CaptureFixture[str]):
    # A model's function and converters print.
    assert output(capsys, "export", "command_models:talkative", "net.pt2", "--json")["path"] == "net.pt2"
    assert main(["inspect", "command_models:talkative", "--json"]) == 0
    captured = capsys.readouterr()
    assert "building" in captured.err
    json.loads(captured.out)


def test_inputs_by_keyword(capsys: pytest.CaptureFixture[str], folder: Path):
    name = "command_models:by_keyword"
    assert "linear" in json.dumps(output(capsys, "inspect", name, "--json"))
    found = output(capsys, "search", name, "--bits-per-weight", "9", "--metric", "psnr", "--json")
    assert found["bits_per_weight"] <= 9
    assert output(capsys, "report", name, "page.html", "--quantize", "int8.yaml", "--json")["tensors"]
    assert main(["export", name, "net.pt2"]) == 2
    assert "by_keyword returns a dict" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]):
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == int(found["broken"])
    assert "python" in {finding["part"] for finding in found["findings"]}


def test_configurations_written_by_the_package_are_read(capsys: pytest.CaptureFixture[str], folder: Path):
    (folder / "p.yaml").write_text(KMeansPalettizerConfig().to_yaml())
    found = output(capsys, "report", "command_models:build", "page.html", "--palettize", "p.yaml", "--json")
    kinds = [each["kind"] for entry in found["tensors"] for each in entry.get("compression", ())]
    assert kinds == ["palettization", "palettization"]
    assert QuantizerConfig().to_yaml()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "COMMAND"),
        (["inspect"], 2, "MODEL"),
        (["inspect", "nothing"], 2, "must be module:function"),
        (["inspect", "no_such_module:build"], 2, "no module 'no_such_module'"),
        (["inspect", "command_models:nothing"], 2, "no function 'nothing'"),
        (["inspect", "command_models:only_a_model"], 2, "must return (model, example_inputs)"),
        (["inspect", "command_models:inputs_in_a_list"], 2, "as a tuple"),
        (["inspect", "command_models:build", "--mode", "fast"], 2, "invalid choice"),
        (["inspect", "command_models:broken"], 1, "RuntimeError: no weights on this machine"),
        (["search", "command_models:build"], 2, "--bits-per-weight"),
        (["search", "command_models:build", "--bits-per-weight", "0.5"], 1, "nothing fits the budget"),
        (["search", "command_models:not_finite", "--bits-per-weight", "9"], 1, "in layer '0'"),
        (
            ["report", "command_models:build", "page.html", "--quantize", "none.yaml"],
            2,
            "--quantize none.yaml",
        ),
        (
            ["report", "command_models:build", "page.html", "--palettize", "int8.yaml"],
            2,
            "--palettize int8.yaml",
        ),
        (["export", "command_models:build", "net.unknown"], 1, "net.unknown"),
        (["export", "command_models:build", "no/such/folder/net.pt2"], 1, "no/such/folder"),
    ],
)
def test_what_goes_wrong(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str], folder: Path
):
    before = set(folder.iterdir())
    assert main(arguments) == status
    assert words in capsys.readouterr().err
    assert {path for path in folder.iterdir() if path.name != "__pycache__"} <= before
