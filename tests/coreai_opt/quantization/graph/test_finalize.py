"""What finalize gives for torch, and what it leaves alone."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import QuantizationSpec, QuantizerConfig
from coreai_opt.quantization.spec import PerChannelGranularity

from .support import Function, mlp, only, prepared, simulators, x

TORCH = ExportBackend.Torch


def test_weights_hold_their_quantized_values() -> None:
    quantizer, found = prepared(mlp(), x(2, 4))
    final: Any = quantizer.finalize(backend=TORCH)
    weight = simulators(found)["activation_post_process_1"]
    assert torch.equal(final.get_parameter("0.weight"), weight(found.get_parameter("0.weight")))
    assert {each.quantization_target for each in simulators(final).values()} == {
        CompressionTargetTensor.ACTIVATION
    }
    assert torch.equal(final(x(3, 4)), found(x(3, 4)))


def test_the_prepared_graph_and_the_model_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    quantizer, found = prepared(model.eval(), x(2, 1, 4, 4))
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    expected = found(x(2, 1, 4, 4))
    first = quantizer.finalize(backend=TORCH)
    second = quantizer.finalize(backend=TORCH)
    assert torch.equal(first(x(2, 1, 4, 4)), second(x(2, 1, 4, 4)))
    after = found.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(found(x(2, 1, 4, 4)), expected)
    with quantizer.training_mode():
        found(x(2, 1, 4, 4))


def test_a_finalized_graph_is_not_prepared() -> None:
    quantizer, _ = prepared(mlp(), x(2, 4))
    final = quantizer.finalize(backend=TORCH)
    with pytest.raises(RuntimeError, match="not prepared"), quantizer.calibration_mode(final):
        pass


def test_copies_are_finalized_too() -> None:
    quantizer, found = prepared(mlp(), x(2, 4))
    final = quantizer.finalize(copy.deepcopy(found), backend=TORCH)
    assert torch.equal(final(x(2, 4)), found(x(2, 4)))


def test_shared_weights_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    model = Function(lambda m, t: m.b(torch.relu(m.a(t))), a=layer, b=layer)
    quantizer, found = prepared(model, x(2, 4))
    final: Any = quantizer.finalize(backend=TORCH)
    assert len([name for name, _ in final.named_parameters()]) == 2
    assert torch.equal(final(x(2, 4)), found(x(2, 4)))


def test_a_weight_with_another_reader_keeps_its_quantizer(caplog: pytest.LogCaptureFixture) -> None:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=0))
    model = Function(lambda m, t: m.fc(t) + m.fc.weight.sum(), fc=nn.Linear(4, 4))
    config = QuantizerConfig(global_config=only(op_state_spec={"weight": spec}))
    quantizer, found = prepared(model, x(2, 4), config=config)
    with caplog.at_level(logging.WARNING):
        final = quantizer.finalize(backend=TORCH)
    assert "fc.weight" in caplog.text
    assert len(simulators(final)) == 1
    assert torch.equal(final(x(2, 4)), found(x(2, 4)))


def test_the_mode_is_kept_and_can_be_changed() -> None:
    quantizer, found = prepared(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), x(2, 4))
    final = quantizer.finalize(backend=TORCH)
    assert final.training
    final.eval()
    assert found.training
    assert torch.equal(final(x(2, 4)), final(x(2, 4)))
