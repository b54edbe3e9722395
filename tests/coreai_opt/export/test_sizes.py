"""Sizes of Core AI programs and Core ML models: weights have as many bits as they were compressed to."""

import pytest
import torch
from torch import nn

from coreai_opt.export import save
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from tests.coreai_opt.export import models
from tests.coreai_opt.export.models import cnn, example, mlp, palettizer, pruner, quantizer

CHANNELS = PerChannelGranularity(axis=0)
BLOCKS, BLOCKS_8 = (PerBlockGranularity(axis=1, block_size=size) for size in (32, 8))

# Bytes of main.mlirb for a linear layer of 512 x 512 without bias, as Apple's package gives them.
SIZES = {
    "float32": (lambda model: None, 1049376),
    "int8": (lambda model: quantizer(model, {"granularity": CHANNELS}), 265272),
    "float8": (lambda model: quantizer(model, {"dtype": "float8_e4m3fn"}), 263179),
    "int4 in blocks": (lambda model: quantizer(model, {"dtype": "int4", "granularity": BLOCKS}), 164921),
    "int2": (lambda model: quantizer(model, {"dtype": "int2", "granularity": CHANNELS}), 68666),
    "float4": (lambda model: quantizer(model, {"dtype": "float4_e2m1fn", "granularity": BLOCKS}), 132107),
    "palette of 2 bits": (lambda model: palettizer(model, n_bits=2), 66528),
    "palette of 4 bits": (lambda model: palettizer(model, n_bits=4), 132112),
    "palette of 8 bits": (lambda model: palettizer(model, n_bits=8), 264189),
    "pruned": (lambda model: pruner(model), 558132),
}


HALF_SIZES = {"float32": 525089, "int8": 264249}

# Bytes of weight.bin for the small networks in half precision, as Apple's package gives them.
INT8 = QuantizationSpec(dtype="int8")
GROUPS = PerGroupedChannelGranularity(axis=0, group_size=8)
CORE_ML_SIZES = {
    "C1": (mlp, lambda model: quantizer(model, {"granularity": CHANNELS}), 3232),
    "C1b": (mlp, lambda model: quantizer(model, {"granularity": CHANNELS, "qscheme": "asymmetric"}), 3488),
    "C2": (cnn, lambda model: quantizer(model, {"dtype": "int4", "granularity": BLOCKS_8}), 5408),
    "C4": (mlp, lambda model: palettizer(model, n_bits=4), 1952),
    "C4a 1 bit": (mlp, lambda model: palettizer(model, n_bits=1), 736),
    "C4a 3 bits": (mlp, lambda model: palettizer(model, n_bits=3), 1376),
    "C4a 6 bits": (mlp, lambda model: palettizer(model, n_bits=6), 2720),
    "C5": (cnn, lambda model: palettizer(model, n_bits=4, granularity=GROUPS), 5344),
    "C6": (mlp, lambda model: palettizer(model, n_bits=4, lut_qspec=INT8), 1952),
    "C7": (mlp, lambda model: palettizer(model, n_bits=8, lut_qspec=INT8), 2976),
    "C8": (mlp, lambda model: palettizer(model, n_bits=4, cluster_dim=2), 1312),
    "C9": (mlp, lambda model: pruner(model), 3424),
}


@pytest.mark.parametrize("case", CORE_ML_SIZES)
@pytest.mark.filterwarnings("ignore:.*takes them for pruned ones")
def test_bytes_of_weights_for_core_ml(case, tmp_path):
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    make, prepare, expected = CORE_ML_SIZES[case]
    model = make()
    prepare(model)
    saved = save(model, tmp_path / "model.mlpackage", example(model), half=True, progress=False)
    (weights,) = saved.path.rglob("weight.bin")
    assert weights.stat().st_size == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("case", HALF_SIZES)
def test_bytes_of_a_program_in_half_precision(case, tmp_path, monkeypatch):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    prepare, _ = SIZES[case]
    assert written_size(prepare, tmp_path, monkeypatch, half=True) == pytest.approx(
        HALF_SIZES[case], rel=0.005
    )


@pytest.mark.parametrize("case", SIZES)
def test_bytes_of_a_program(case, tmp_path, monkeypatch):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    prepare, expected = SIZES[case]
    assert written_size(prepare, tmp_path, monkeypatch) == pytest.approx(expected, rel=0.005)


def written_size(prepare, folder, monkeypatch, **options):
    """Bytes of the program of a linear layer that is prepared by a compressor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
    inputs = (torch.randn(4, 512),)
    monkeypatch.setattr(models, "example", lambda _: inputs)
    prepare(model)
    saved = save(model, folder / "model.aimodel", inputs, progress=False, **options)
    return (saved.path / "main.mlirb").stat().st_size
