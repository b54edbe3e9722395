"""Models that are pruned, then quantized: a weight's simulator is behind its mask."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_opt import ExportBackend
from coreai_opt.pruning import MagnitudePruner, MagnitudePrunerConfig
from coreai_opt.quantization import Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import StaticQParamsCalculator

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Calls of the very function that the mask is multiplied with, so that none may be taken for another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(torch.mul(x, x), self.first.weight, self.first.bias)
        return torch.mul(self.second(hidden), 2.0)


def both() -> tuple[nn.Module, MagnitudePruner, Quantizer]:
    torch.manual_seed(0)
    model = Net()
    pruner = MagnitudePruner(model, MagnitudePrunerConfig())
    pruner.prepare((X,))
    quantizer = Quantizer(model, QuantizerConfig(execution_mode="eager"))
    quantizer.prepare((X,))
    return model, pruner, quantizer


def places(model: nn.Module) -> set[str]:
    return {key.rsplit(".", 2)[0] for key in model.state_dict() if key.endswith("qparams_calculator.scale")}


def test_simulators_are_where_they_are_without_masks_but_behind_them() -> None:
    model, *_ = both()
    plain = Net()
    Quantizer(plain, QuantizerConfig(execution_mode="eager")).prepare((X,))
    assert places(model) == {place.replace("weight.0", "weight.1") for place in places(plain)}
    for layer in (model.first, model.second):
        mask, simulator = layer.parametrizations.weight
        assert isinstance(simulator.qparams_calculator, StaticQParamsCalculator)
        original = layer.parametrizations.weight.original
        assert torch.equal(layer.weight, simulator(mask(original)))
        assert (layer.weight == 0).float().mean() >= 0.5


def test_training_keeps_both() -> None:
    model, pruner, quantizer = both()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with quantizer.training_mode():
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(X).square().mean()
            loss.backward()
            optimizer.step()
            pruner.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    weight = model.first.weight
    assert (weight == 0).float().mean() >= 0.5
    assert weight[0].unique().numel() <= 256


def test_a_function_of_the_model_is_not_taken_for_one_of_the_mask() -> None:
    model, *_ = both()
    with torch.no_grad():
        before = model(X)
        model.first.parametrizations.weight[0].mask.fill_(True)
        model.second.parametrizations.weight[0].mask.fill_(True)
        assert not torch.equal(model(X), before)
    assert "mul" not in "".join(name for name, _ in model.first.parametrizations.named_modules())


def test_checkpoints_and_copies() -> None:
    model, *_ = both()
    other, *_ = both()
    with torch.no_grad():
        model.first.parametrizations.weight.original.mul_(3)
        for simulator in (model.first.parametrizations.weight[1], model.second.parametrizations.weight[1]):
            simulator.qparams_calculator.scale.mul_(3)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(X), model(X))
        assert torch.equal(copy.deepcopy(model)(X), model(X))


@pytest.mark.parametrize("first", ["pruner", "quantizer"])
def test_finalize_folds_mask_and_simulator(first: str) -> None:
    model, pruner, quantizer = both()
    compressors = {"pruner": pruner, "quantizer": quantizer}
    with torch.no_grad():
        expected = model.eval()(X)
        compressors.pop(first).finalize(backend=ExportBackend.Torch)
        assert not any("parametrizations" in key for key in model.state_dict())
        assert torch.equal(model(X), expected)
        compressors.popitem()[1].finalize(backend=ExportBackend.Torch)
        assert torch.equal(model(X), expected)
    assert (model.first.weight == 0).float().mean() >= 0.5


def test_the_pruner_comes_first() -> None:
    model = Net()
    Quantizer(model, QuantizerConfig(execution_mode="eager")).prepare((X,))
    before = dict(model.state_dict())
    with pytest.raises(RuntimeError, match="prepare the model with MagnitudePruner, then"):
        MagnitudePruner(model, MagnitudePrunerConfig()).prepare((X,))
    assert model.state_dict().keys() == before.keys()
