"""Containers whose own operations have simulators."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt.quantization import QuantizationSpec
from coreai_opt.quantization.spec import PerBlockGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

from .support import Mlp, eager, globally, prepared, slots

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
ACTIVATIONS_ONLY = {"op_state_spec": None}


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + nn.Sequential.forward(self, x)


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x * 2 - layer(x)
        return (x + self[-1].bias) * len(self)


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.items():
            x = x @ self[name].weight + layer(x)
        return x * len(list(self)) * len(self.keys()) * len(self.values())


class Owning(Residual):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.weight)


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(8, 8), nn.Linear(8, 8)]


MAKES = {
    "Sequential": lambda: Residual(*layers()),
    "ModuleList": lambda: Listed(layers()),
    "ModuleDict": lambda: Named(dict(zip("ab", layers(), strict=True))),
    "with a parameter": lambda: Owning(*layers()),
}


@pytest.fixture(params=MAKES)
def make(request):
    return MAKES[request.param]


def relative_error(model: nn.Module, reference: nn.Module) -> float:
    expected = reference(X)
    return ((model(X) - expected).norm() / expected.norm()).item()


def test_simulators_are_no_layers(make) -> None:
    _, model = prepared(make(), X)
    assert any("." not in slot for slot in slots(model))
    assert len(model) == 2
    assert relative_error(model, make()) < 0.05


def test_types_and_names_stay(make) -> None:
    cls = type(make())
    _, model = prepared(nn.Sequential(make()), X, config=eager(module_type_configs={cls: None}))
    assert slots(model) == set()
    _, model = prepared(make(), X)
    assert isinstance(model, cls)
    assert cls.__name__ in type(model).__name__


def test_copies(make) -> None:
    _, model = prepared(make(), X)
    other = copy.deepcopy(model)
    assert torch.equal(other(X), model(X))
    assert len(other) == 2


def test_pickles(make) -> None:
    _, model = prepared(make(), X, config=globally(**ACTIVATIONS_ONLY))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(X), model(X))
    assert len(other) == 2


def test_checkpoints(make) -> None:
    _, model = prepared(make(), X)
    _, other = prepared(make(), 3 * X)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_compiled(make) -> None:
    torch._dynamo.reset()
    _, model = prepared(make(), X)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), model(X))


def test_finalized(make) -> None:
    quantizer, model = prepared(make(), X)
    expected = model(X)
    quantizer.finalize(backend="torch")
    assert torch.equal(model(X), expected)


def test_positions_and_slices() -> None:
    _, model = prepared(Residual(*layers()), X)
    assert model[1] is model.get_submodule("1")
    assert model[-1] is model[1]
    assert type(model[:1]) is Residual
    assert list(model[:1]) == [model[0]]
    with pytest.raises(IndexError):
        model[2]


def test_a_method_of_the_user_stays() -> None:
    class Reversed(Residual):
        def __iter__(self):
            return iter([self[1], self[0]])

    _, model = prepared(Reversed(*layers()), X)
    assert list(model) == [model[1], model[0]]


def test_a_container_without_simulators_has_its_class() -> None:
    blocks = QuantizationSpec(granularity=PerBlockGranularity(axis=1, block_size=3))
    config = globally(op_state_spec=None, op_input_spec={"*": blocks}, op_output_spec=None)
    _, model = prepared(Residual(*layers()), X, config=config)
    assert slots(model) == set()
    assert type(model) is Residual
    _, model = prepared(nn.Sequential(Mlp()), X)
    assert type(model) is nn.Sequential


def test_a_container_that_torch_has_parametrized() -> None:
    class First(Owning):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x) * self.weight

    model = First(*layers())
    parametrize.register_parametrization(model, "weight", nn.Identity())
    _, model = prepared(model, X)
    assert slots(model)
    assert not any(isinstance(each, FakeQuantizeImplBase) for each in model)
    assert parametrize.type_before_parametrizations(model).__name__ == "First"
    parametrize.remove_parametrizations(model, "weight")
    assert len(model) == 2
    assert isinstance(model, First)
