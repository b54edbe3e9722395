"""Folding: dense weights of the simulated values, in the parameters from before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.export.torch import fold


class Round(CompressionSimulatorBase):
    """A simulator that does something else in training."""

    def forward(self, tensor):
        return tensor.round() if not self.training else tensor * 100


class Double(nn.Module):
    def forward(self, tensor):
        return tensor * 2


class Fail(CompressionSimulatorBase):
    def forward(self, tensor):
        raise RuntimeError("no statistics")


def linear(*simulators):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.mul_(10)
    for simulator in simulators:
        parametrize.register_parametrization(layer, "weight", simulator, unsafe=True)
    return layer


def test_the_parameter_stays_the_same_object_in_the_same_memory():
    layer = linear()
    weight, memory, float_value = layer.weight, layer.weight.data_ptr(), layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Round(), unsafe=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    assert fold(layer, Round) == [(layer, "weight")]
    assert layer.weight is weight
    assert weight.data_ptr() == memory
    assert torch.equal(weight, float_value.round())
    assert type(layer) is nn.Linear
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, float_value.round())


def test_values_are_those_of_evaluation_and_other_modules_keep_training():
    model = nn.Sequential(linear(Round()), nn.Dropout())
    expected = linear().weight.detach().round()
    model.train()
    fold(model, Round)
    assert torch.equal(model[0].weight, expected)
    assert model[0].training
    assert model[1].training


def test_parametrizations_of_others_are_folded_too_and_tensors_of_others_stay():
    model = nn.Sequential(linear(Double(), Round(), Double()), linear(Double()))
    expected = (linear().weight.detach() * 2).round() * 2
    fold(model, Round)
    assert torch.equal(model[0].weight, expected)
    assert not parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(model[1])


def test_a_frozen_tensor_stays_frozen():
    layer = linear()
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Round(), unsafe=True)
    fold(layer, Round)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


class Count(CompressionSimulatorBase):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, tensor):
        self.calls += 1
        return tensor + 1


def test_a_tied_tensor_stays_tied_and_is_folded_once():
    first, second, count = linear(), nn.Linear(4, 4), Count()
    second.weight = first.weight
    weight, before = first.weight, first.weight.detach().clone()
    for layer in (first, second):
        parametrize.register_parametrization(layer, "weight", count, unsafe=True)
    count.calls = 0
    fold(nn.Sequential(first, second), Count)
    assert first.weight is second.weight is weight
    assert torch.equal(weight, before + 1)
    assert count.calls == 1


def test_places_of_one_tensor_that_are_simulated_otherwise_keep_their_values():
    first, second = linear(), nn.Linear(4, 4)
    second.weight = first.weight
    value = first.weight.detach().clone()
    parametrize.register_parametrization(first, "weight", Round(), unsafe=True)
    parametrize.register_parametrization(second, "weight", Round(), unsafe=True)
    parametrize.register_parametrization(second, "weight", Double(), unsafe=True)
    fold(nn.Sequential(first, second), Round)
    assert torch.equal(first.weight, value.round())
    assert torch.equal(second.weight, value.round() * 2)
    assert isinstance(second.weight, nn.Parameter)


def test_a_copy_is_folded_and_the_original_stays_whole():
    model = nn.Sequential(linear(Round()), linear(Round())).eval()
    twin, expected = copy.deepcopy(model), model(torch.ones(4))
    fold(twin, Round)
    assert torch.equal(model(torch.ones(4)), expected)
    assert torch.equal(twin(torch.ones(4)), expected)
    assert parametrize.is_parametrized(model[0])
    fold(model, Round)
    assert torch.equal(model(torch.ones(4)), expected)


def test_two_tensors_of_a_module():
    layer = linear(Round())
    parametrize.register_parametrization(layer, "bias", Round(), unsafe=True)
    twin, bias = copy.deepcopy(layer), layer.bias.detach()
    fold(layer, Round)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.eval().weight, linear().weight.round())
    assert bias.shape == (4,)
    assert parametrize.is_parametrized(twin, "bias")


def test_buffers_and_values_of_another_dtype():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((3,), 1.5))

    class Halve(CompressionSimulatorBase):
        def forward(self, tensor):
            return (tensor / 2).to(torch.float16)

    module = Scaled()
    parametrize.register_parametrization(module, "scale", Halve(), unsafe=True)
    fold(module, Halve)
    assert module.scale.dtype is torch.float16
    assert module.scale.tolist() == [0.75] * 3
    assert "scale" in dict(module.named_buffers())


def test_a_weight_that_is_made_of_several_tensors():
    layer = parametrizations.weight_norm(linear())
    parametrize.register_parametrization(layer, "weight", Round(), unsafe=True)
    expected = layer.eval().weight.detach().clone()
    fold(layer, Round)
    assert torch.equal(layer.weight, expected)
    assert isinstance(layer.weight, nn.Parameter)


def test_expanded_memory_is_not_written():
    layer = linear()
    row = torch.tensor([[0.4, 1.6, 2.4, 3.6]])
    layer.weight = nn.Parameter(row.expand(4, 4))
    parametrize.register_parametrization(layer, "weight", Round(), unsafe=True)
    fold(layer, Round)
    assert layer.weight.tolist() == [[0.0, 2.0, 2.0, 4.0]] * 4
    assert row.tolist()[0][0] == pytest.approx(0.4)


def test_a_simulator_that_fails_leaves_its_tensor_and_those_behind_it():
    model = nn.Sequential(linear(Fail()), linear(Round()))
    model.train()
    with pytest.raises(RuntimeError, match="no statistics"):
        fold(model, CompressionSimulatorBase)
    assert parametrize.is_parametrized(model[0])
    assert parametrize.is_parametrized(model[1])
    assert all(module.training for module in model.modules())
