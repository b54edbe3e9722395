"""Convolutions with a batch norm behind."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.config.spec import CompressionTargetTensor

from .support import prepared, simulators

PAIRS = {
    "conv1d": (lambda **options: nn.Conv1d(2, 3, 3, **options), nn.BatchNorm1d, (4, 2, 6)),
    "conv2d": (lambda **options: nn.Conv2d(2, 3, 3, **options), nn.BatchNorm2d, (4, 2, 6, 6)),
    "transposed": (lambda **options: nn.ConvTranspose2d(2, 3, 3, **options), nn.BatchNorm2d, (4, 2, 6, 6)),
    "transposed1d": (lambda **options: nn.ConvTranspose1d(2, 3, 3, **options), nn.BatchNorm1d, (4, 2, 6)),
    "depthwise": (lambda **options: nn.Conv2d(2, 4, 3, groups=2, **options), nn.BatchNorm2d, (4, 2, 6, 6)),
}


def pair(kind: str, bias: bool = True, **options: Any) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    make, norm, shape = PAIRS[kind]
    convolution = make(bias=bias)
    model = nn.Sequential(convolution, norm(convolution.out_channels, **options), nn.ReLU())
    inputs = torch.randn(shape)
    model(inputs)  # running statistics that are not those of a new module
    if options.get("affine", True):
        with torch.no_grad():
            model[1].weight.uniform_(-2, 2)
            model[1].bias.uniform_(-1, 1)
    return model, inputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PAIRS)
def test_without_simulation_the_graph_computes_what_the_model_does(kind: str, bias: bool) -> None:
    model, inputs = pair(kind, bias, eps=0.05, momentum=0.3)
    twin = copy.deepcopy(model)
    quantizer, found = prepared(model, inputs)
    twin[1].num_batches_tracked += 1  # by prepare, in a graph exported in training mode
    quantizer.disable_fake_quant()
    found.eval()
    torch.testing.assert_close(found(inputs), twin.eval()(inputs), rtol=1e-4, atol=1e-4)
    found.train()
    torch.testing.assert_close(found(inputs), twin.train()(inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.get_buffer("1.running_var"), twin[1].running_var)


def test_the_weight_is_quantized_as_it_will_be_folded() -> None:
    model, inputs = pair("conv2d")
    _, found = prepared(model.eval(), inputs)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    (weight,) = [
        each
        for each in simulators(found).values()
        if each.quantization_target is CompressionTargetTensor.WEIGHT
    ]
    largest = folded.weight.abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(weight.qparams_calculator.scale, largest / 127.5)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PAIRS)
def test_the_finalized_graph_has_one_operator_and_the_same_output(
    kind: str, bias: bool, options: dict[str, Any]
) -> None:
    model, inputs = pair(kind, bias, **options)
    quantizer, found = prepared(model.eval(), inputs)
    expected = found(inputs)
    final: Any = quantizer.finalize(backend=ExportBackend.Torch)
    assert not [node for node in final.graph.nodes if "batch_norm" in str(node.target)]
    torch.testing.assert_close(final(inputs), expected, rtol=1e-4, atol=0.02)


def test_pairs_without_statistics_stay_apart() -> None:
    model, inputs = pair("conv2d", track_running_stats=False)
    quantizer, found = prepared(model, inputs)
    quantizer.disable_fake_quant()
    torch.testing.assert_close(found(inputs), model(inputs))
    final: Any = quantizer.finalize(backend=ExportBackend.Torch)
    assert [node for node in final.graph.nodes if "batch_norm" in str(node.target)]


def test_a_graph_exported_in_training_folds_and_stops_counting() -> None:
    model, inputs = pair("conv2d")
    quantizer, _ = prepared(model.train(), inputs)
    final: Any = quantizer.finalize(backend=ExportBackend.Torch)
    before = model[1].num_batches_tracked.item()
    final(inputs)
    assert model[1].num_batches_tracked.item() == before
