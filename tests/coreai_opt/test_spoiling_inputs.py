"""Inputs and arguments that would spoil a model without a word."""

import logging

import pytest
import torch
from torch import nn

import coreai_opt
from coreai_opt.quantization import Quantizer, QuantizerConfig

NAN = float("nan")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


@pytest.fixture
def x():
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(1))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_activations_that_are_nan_are_named(mode, x, caplog):
    with caplog.at_level(logging.WARNING, "coreai_opt"):
        Quantizer(network(), QuantizerConfig(execution_mode=mode)).prepare((x * NAN,))
    assert [each for each in caplog.messages if "NaN in the forward on the example inputs" in each]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_empty_example_inputs_are_refused(mode, x):
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=r"example_inputs must hold elements.* got shapes \(0, 32\)"):
        Quantizer(model, QuantizerConfig(execution_mode=mode)).prepare((x[:0],))
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_calibration_refuses_what_would_stay_in_a_range(value, x):
    model, quantizer = coreai_opt.quantize(network(), x, "w8a8")
    model.eval()
    before, expected = state(model), model(x)
    with pytest.raises(ValueError, match=r"the data give '0.linear_quantize_input'.* NaN or infinite values"):
        quantizer.calibrate([x, x * value])
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)
    quantizer.calibrate([x * 2])
    assert not torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="NaN or infinite values"):
        coreai_opt.quantize(network(), [x, x * value], "w8a8")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: coreai_opt.quantize(m, x, "w8a8", algorithm="gpt"), "Did you mean 'gptq'"),
        (lambda m, x: coreai_opt.quantize(m, x, "w8a8", algorithm=3), "algorithm must be a name"),
        (lambda m, x: coreai_opt.quantize(m, x, finalize="onnx"), "finalize must be one of torch, coreml"),
        (lambda m, x: coreai_opt.prune(m, x, 0.5, finalize="onnx"), "finalize must be one of torch, coreml"),
        (lambda m, x: coreai_opt.palettize(m, x, 4, finalize=True), "finalize must be one of torch, coreml"),
        (lambda m, x: coreai_opt.quantize(m, x, "w8", head="w5"), "head: scheme must be 'w4'"),
        (lambda m, x: coreai_opt.palettize(m, x, 4, head=4.5), "head: n_bits must be an int"),
    ],
)
def test_arguments_are_looked_at_before_the_model_changes(call, message, x):
    model = network()
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=message):
        call(model, x)
    assert_unchanged(model, before)
    coreai_opt.quantize(model, x, "w8")


@pytest.mark.parametrize("compress", [coreai_opt.quantize, coreai_opt.prune, coreai_opt.palettize])
def test_what_torch_jit_made_is_refused(compress, x):
    with pytest.raises(TypeError, match=r"TopLevelTracedModule, which torch\.jit made"):
        compress(torch.jit.trace(network(), x), x)


def test_the_state_of_another_compressor_is_refused(x):
    _, quantizer = coreai_opt.quantize(network(), x, "w8")
    _, pruner = coreai_opt.prune(network(), x, 0.5)
    pruner.step()
    with pytest.raises(ValueError, match="of another compressor than a MagnitudePruner"):
        pruner.load_state_dict(quantizer.state_dict())
    assert pruner.state_dict()["step_count"] == 1
    for compressor in (quantizer, pruner):
        with pytest.raises(TypeError, match=r"state_dict must be a mapping, .* got int"):
            compressor.load_state_dict(3)
