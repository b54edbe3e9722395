"""Weights that are compressed already are states of the graph: activations are quantized around them."""

from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.palettization import KMeansPalettizer

from .support import prepared, simulators, x


def test_activations_of_palettized_layers_are_quantized() -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    palettizer = KMeansPalettizer(model)
    palettizer.prepare((x(2, 16),))
    palettized = palettizer.finalize(backend=ExportBackend.CoreAI)
    expected = palettized(x(2, 16))
    quantizer, found = prepared(palettized, x(2, 16))
    quantizers = simulators(found)
    assert list(quantizers) == [f"activation_post_process_{number}" for number in range(3)]
    assert {each.quantization_target for each in quantizers.values()} == {CompressionTargetTensor.ACTIVATION}
    torch.testing.assert_close(found(x(2, 16)), expected, rtol=0, atol=0.05)
    final: Any = quantizer.finalize(backend=ExportBackend.CoreAI)
    targets = [str(node.target) for node in final.graph.nodes]
    assert sum("lut_to_dense" in target for target in targets) == 2
    assert sum("coreai.quantize" in target for target in targets) == 3
    torch.testing.assert_close(final(x(2, 16)), found(x(2, 16)), rtol=0, atol=1e-5)
