"""What a graph module keeps of the model besides its tensors."""

from typing import Any

import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.quantization import QuantizerConfig

from .support import mlp, prepared, x


def test_metadata_of_an_earlier_compression_comes_along() -> None:
    # With a batch norm: then buffers that the graph does not read leave the prepared one.
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3))
    model[0][2].register_buffer("_COREML_/weight/lut", torch.arange(4.0))
    quantizer, found = prepared(model, x(2, 4))
    assert not [name for name in found.state_dict() if "_COREML_" in name]
    final: Any = quantizer.finalize(backend=ExportBackend.Torch)
    assert torch.equal(final.get_buffer("0.2._COREML_/weight/lut"), torch.arange(4.0))


def test_preserved_attributes_are_those_of_the_finalized_graph_too() -> None:
    model = mlp()
    model.labels = ["a", "b"]
    quantizer, _ = prepared(model, x(2, 4), config=QuantizerConfig(preserved_attributes=["labels"]))
    final: Any = quantizer.finalize(backend=ExportBackend.Torch)
    assert final.labels == ["a", "b"]
