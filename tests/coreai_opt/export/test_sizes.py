"""Sizes of Core AI programs: weights are stored in as many bits as they were compressed to."""

import pytest
import torch
from torch import nn

from coreai_opt.export import save
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity
from tests.coreai_opt.export import models
from tests.coreai_opt.export.models import palettizer, pruner, quantizer

CHANNELS = PerChannelGranularity(axis=0)
BLOCKS = PerBlockGranularity(axis=1, block_size=32)

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


@pytest.mark.parametrize("case", SIZES)
def test_bytes_of_a_program(case, tmp_path, monkeypatch):
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    prepare, expected = SIZES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
    inputs = (torch.randn(4, 512),)
    monkeypatch.setattr(models, "example", lambda _: inputs)
    prepare(model)
    saved = save(model, tmp_path / "model.aimodel", inputs, progress=False)
    size = (saved.path / "main.mlirb").stat().st_size
    assert size == pytest.approx(expected, rel=0.005)
