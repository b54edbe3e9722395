"""Files of strangers: no code comes from them, and nothing outside of their folder is touched."""

import ast
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import coreai_opt
from coreai_opt import ExportBackend
from coreai_opt.export import load_checkpoint, save
from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig

ROOT = Path(__file__).parents[1]
# Copies of whole graph modules: what a user pickles is a pickle in any case.
MAY_PICKLE = {"coreai_opt/quantization/_graph/graph_module.py"}
# What runs or finds code that data name.
RUN_CODE = {"eval", "exec", "compile", "__import__", "torch.jit.load"} | {
    f"yaml.{each}" for each in ("load", "load_all", "unsafe_load", "full_load")
}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def sources() -> Iterator[tuple[str, ast.AST]]:
    """What is installed, file by file."""
    for folder in ("coreai_opt", "kernels/coreai_kernels", "kernels/coreai_accelerate"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def name_of(node: ast.AST) -> str:
    """``torch.load`` for the call's function; empty for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Calls and imports that may run what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (f"import {each}" for each in modules if (each or "").split(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {each.arg: each.value for each in node.keywords}
        if name == "torch.load":
            only = given.get("weights_only")
            if not (isinstance(only, ast.Constant) and only.value is True):
                yield "torch.load without weights_only=True"
        elif name in RUN_CODE:
            yield name


def test_the_package_reads_no_pickle_and_runs_no_text() -> None:
    assert list(unsafe(ast.parse("import pickle; torch.load(f, weights_only=False); eval(text)")))
    found = {name: list(unsafe(tree)) for name, tree in sources()}
    assert {name for name, calls in found.items() if calls} <= MAY_PICKLE, found
    assert len(found) > 200


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


INPUTS = (torch.ones(2, 8),)


def written(folder: Path) -> None:
    """All kinds of files that the package writes without an optional package."""
    model = network()
    weights = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None)
    quantizer = Quantizer(model, QuantizerConfig(global_config=weights, execution_mode="eager"))
    quantizer.prepare(INPUTS)
    coreai_opt.save_checkpoint(model, folder / "prepared.safetensors")
    save(model.eval(), folder / "compressed.safetensors", INPUTS, progress=False)
    save(model, folder / "program.pt2", INPUTS, progress=False)
    palettizer = KMeansPalettizer(network())
    palettized = palettizer.prepare(INPUTS)
    with palettizer.calibration_mode(loss_fn=nn.functional.mse_loss) as helper:
        helper.step(palettized(*INPUTS), torch.ones(2, 4))
    palettizer.save_sensitivities(folder / "sensitivities.pt")


@pytest.mark.filterwarnings("ignore")
def test_files_hold_data_alone(tmp_path: Path) -> None:
    """safetensors, JSON, and what ``torch.load(weights_only=True)`` reads."""
    written(tmp_path)
    assert torch.load(tmp_path / "sensitivities.pt", weights_only=True)
    for path in tmp_path.glob("*.safetensors"):
        size = int.from_bytes(path.read_bytes()[:8], "little")
        assert json.loads(path.read_bytes()[8 : 8 + size])
    with zipfile.ZipFile(tmp_path / "program.pt2") as archive:
        weights = [each for each in archive.namelist() if each.endswith((".pkl", ".pickle"))]
    assert not weights, weights


NAMES = ["/etc/weight", "a/b", "~root"]


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("name", NAMES)
def test_files_of_modules_with_strange_names_are_in_the_folder(name: str, mode: Any, tmp_path: Path) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: network()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts[name](x)

    quantizer = Quantizer(Named(), QuantizerConfig(execution_mode=mode))
    prepared = quantizer.prepare(INPUTS).eval()
    expected = prepared(*INPUTS)
    final = quantizer.finalize(backend=ExportBackend.CoreAI, mmap_dir=tmp_path / "weights")
    assert len([each for each in (tmp_path / "weights").iterdir() if each.suffix == ".safetensors"]) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["weights"]
    torch.testing.assert_close(final(*INPUTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_read_from_its_own_folder(tmp_path: Path) -> None:
    """A folder whose index names files elsewhere gets nothing from there."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    written(tmp_path)
    (tmp_path / "compressed.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "config.json").write_text("{}")
    elsewhere = {"0.weight": "../elsewhere.safetensors", "2.weight": str(tmp_path / "elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": elsewhere}))
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_checkpoint(network(), folder)


def test_shards_of_transformers_are_in_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from coreai_opt.integrations.transformers import save_pretrained

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))
    coreai_opt.quantize(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, "w4")
    folder = tmp_path / "model"
    save_pretrained(model, folder, max_shard_size="10KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    (folder / shard).rename(tmp_path / shard)
    for outside in (f"../{shard}", str(tmp_path / shard)):
        shards = {name: outside if file == shard else file for name, file in index["weight_map"].items()}
        path.write_text(json.dumps(index | {"weight_map": shards}))
        with pytest.raises(ValueError, match="outside of its folder"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
