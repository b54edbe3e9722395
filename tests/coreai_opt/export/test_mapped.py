"""Compressed weights in files that are mapped into memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from tests.coreai_opt.export import core_ai
from tests.coreai_opt.export.models import example, mlp, output, palettizer, quantizer

INT8 = {"granularity": PerChannelGranularity(axis=0)}
FLOAT4 = {"dtype": "float4_e2m1fn", "granularity": PerBlockGranularity(axis=1, block_size=32)}
TABLES = {"n_bits": 4, "lut_qspec": QuantizationSpec(dtype="int8")}


@pytest.fixture
def operators():
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")


@pytest.mark.parametrize(
    ("made", "keys"),
    [
        (lambda model: quantizer(model, INT8, {}), ["quantized_data", "scale", "zero_point"]),
        (lambda model: quantizer(model, FLOAT4), ["quantized_data", "scale"]),
        (lambda model: palettizer(model, **TABLES), ["indices", "lut", "scale", "zero_point"]),
    ],
)
def test_one_file_a_weight(operators, made, keys, tmp_path):
    model, folder = mlp(), tmp_path / "new" / "weights"
    compressor = made(model)
    expected = output(model)
    finalized = compressor.finalize(mmap_dir=folder)
    assert sorted(each.name for each in folder.iterdir()) == ["0.weight.safetensors", "2.weight.safetensors"]
    held = model[0].parametrizations.weight[0]
    stored = load_file(folder / "0.weight.safetensors")
    assert sorted(stored) == keys
    for name, value in stored.items():
        assert torch.equal(getattr(held, name).view(torch.uint8), value.view(torch.uint8))
    assert str(folder / "0.weight.safetensors") in Path("/proc/self/maps").read_text()
    assert torch.equal(output(finalized), expected)
    program = core_ai.convert(finalized, example(finalized))
    assert (core_ai.run(program, example(finalized), tmp_path) - expected).abs().max() <= 3e-7


def test_the_folder(operators, tmp_path):
    model = mlp()
    made = quantizer(model, INT8)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="mmap_dir"):
        made.finalize(mmap_dir=file)
    with pytest.raises(FileExistsError, match="mmap_dir"):
        made.finalize(mmap_dir=tmp_path)
    with pytest.raises(ValueError, match="mmap_dir"):
        made.finalize(backend=ExportBackend.CoreML, mmap_dir=tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    made.finalize(mmap_dir=str(tmp_path / "new"))


def test_other_devices_are_refused(tmp_path):
    from coreai_opt.export import mapped

    with pytest.raises(ValueError, match="'weight' is on meta"):
        mapped.check(nn.Linear(2, 2, device="meta"), tmp_path / "new")


def test_nothing_is_left_behind_if_a_weight_fails(operators, tmp_path, monkeypatch):
    from coreai_opt.export import coreai

    written = coreai.weight_module

    def failing(record, name):
        if name == "2.weight":
            raise ValueError("no")
        return written(record, name)

    monkeypatch.setattr(coreai, "weight_module", failing)
    model = mlp()
    made = quantizer(model, INT8)
    expected = output(model)
    with pytest.raises(ValueError, match="no"):
        made.finalize(mmap_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert torch.equal(output(model), expected)
    monkeypatch.undo()
    made.finalize(mmap_dir=tmp_path / "new")
