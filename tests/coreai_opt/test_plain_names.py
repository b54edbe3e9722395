"""Float weights load into prepared models under the names that they have everywhere else."""

import logging

import pytest
import torch
from torch import nn

from coreai_opt.palettization import KMeansPalettizer
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def quantizer(model):
    config = ModuleQuantizerConfig.presets.w4_per_block()
    return Quantizer(model, QuantizerConfig(global_config=config, execution_mode="eager"))


def loaded(model, state):
    """The weights behind the simulators."""
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    return [model[i].parametrizations.weight.original for i in (0, 2)]


@pytest.mark.parametrize("compressor", [quantizer, MagnitudePruner, KMeansPalettizer])
def test_float_weights_reach_the_tensors_behind_simulators(compressor, caplog):
    model, other = network(0), network(1)
    compressor(model).prepare((X,))
    with caplog.at_level(logging.WARNING, "coreai_opt"):
        weights = loaded(model, other.state_dict())
    assert torch.equal(weights[0], other[0].weight)
    assert torch.equal(weights[1], other[2].weight)
    assert torch.equal(model[0].bias, other[0].bias)
    # What simulators hold is of other weights: said, once.
    assert [each.message for each in caplog.records if "2 float weights" in each.message]


def test_inside_of_another_module():
    model, other = nn.ModuleDict({"net": network(0)}), nn.ModuleDict({"net": network(1)})
    quantizer(model["net"]).prepare((X,))
    assert not model.load_state_dict(other.state_dict(), strict=False).unexpected_keys
    weights = model["net"][0].parametrizations.weight.original
    assert torch.equal(weights, other["net"][0].weight)


def test_own_states_load_strictly_and_without_a_word(caplog):
    model, other = network(0), network(1)
    quantizer(model).prepare((X,))
    quantizer(other).prepare((X,))
    with caplog.at_level(logging.WARNING, "coreai_opt"):
        model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), other(X))
    assert not caplog.records


def test_a_strict_load_says_what_float_states_lack():
    model = network(0)
    quantizer(model).prepare((X,))
    with pytest.raises(
        RuntimeError, match=r'Missing key.*"0\.parametrizations\.weight\.0\.fake_quant_enabled"'
    ):
        model.load_state_dict(network(1).state_dict())


def test_training_follows_the_loaded_weights():
    model, other = network(0), network(1)
    made = quantizer(model)
    made.prepare((X,))
    loaded(model, other.state_dict())
    with made.training_mode():
        model(X)
    quantizer(other).prepare((X,))
    assert torch.equal(model(X), other(X))
