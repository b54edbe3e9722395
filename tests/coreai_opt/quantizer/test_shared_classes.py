"""Parametrized modules of one kind share a class, and none notices it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from .support import WEIGHTS_ONLY, globally, prepared

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    return prepared(layers, X, config=globally(**WEIGHTS_ONLY))[1]


def test_layers_share_a_class_of_the_usual_name(model: nn.Module) -> None:
    first, second, third = model
    assert type(first) is type(second) is type(third)
    assert type(first).__name__ == "ParametrizedLinear"
    assert parametrize.type_before_parametrizations(first) is nn.Linear


@pytest.mark.parametrize("leave", [True, False])
def test_a_parametrization_can_be_removed_from_one(model: nn.Module, leave: bool) -> None:
    second = model[1]
    expected = [layer.weight.detach().clone() for layer in model]
    if not leave:
        expected[1] = second.parametrizations.weight.original.detach().clone()
    parametrize.remove_parametrizations(second, "weight", leave_parametrized=leave)
    assert type(second) is nn.Linear
    assert isinstance(second.weight, nn.Parameter)
    for layer, weight in zip(model, expected, strict=True):
        assert torch.equal(layer.weight, weight)
    assert model(X).shape == X.shape


def test_a_parametrization_can_be_added_to_one_and_removed(model: nn.Module) -> None:
    first, second, third = model
    bias = second.bias.detach().clone()
    parametrize.register_parametrization(second, "bias", Double())
    assert torch.equal(second.bias, 2 * bias)
    assert isinstance(first.bias, nn.Parameter)
    first.bias = nn.Parameter(torch.ones(8))
    assert torch.equal(first(X), nn.functional.linear(X, first.weight, torch.ones(8)))
    parametrize.remove_parametrizations(second, "weight")
    parametrize.remove_parametrizations(second, "bias", leave_parametrized=False)
    assert type(second) is nn.Linear
    assert torch.equal(second.bias, bias)
    assert not hasattr(third, "absent")


def test_copies_lose_nothing_with_the_original(model: nn.Module) -> None:
    copied = copy.deepcopy(model)
    expected = copied(X)
    for layer in model:
        parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(copied(X), expected)
