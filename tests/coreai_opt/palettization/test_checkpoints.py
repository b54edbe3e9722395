"""Palettized models that begin with a checkpoint, and models whose palettization has ended."""

import copy

import pytest
import torch
from palettized_models import (
    INPUTS,
    TARGET,
    assert_unchanged,
    loss_of,
    make_config,
    make_model,
    prepared,
    simulator_of,
    state_of,
)
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt.common import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, PalettizationSpec
from coreai_opt.palettization.kmeans import _search
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization.spec import QuantizationSpec

GROUPS = PerGroupedChannelGranularity(axis=0, group_size=4)
SPECS = {
    "scalars": {},
    "scaled": {"enable_per_channel_scale": True},
    "LUT in int8": {"lut_qspec": QuantizationSpec()},
    "LUT in float8, groups": {"lut_qspec": QuantizationSpec(dtype="float8_e4m3fn"), "granularity": GROUPS},
    "vectors": {"cluster_dim": 2},
    "pruned": {"sparsity_detection_threshold": 0.1},
    "pruned vectors": {"sparsity_detection_threshold": 0.1, "cluster_dim": 2},
    "pruned vectors that do not divide the channels": {"sparsity_detection_threshold": 0.1, "cluster_dim": 3},
    "pruned, LUT in float8, groups": {
        "sparsity_detection_threshold": 0.1,
        "lut_qspec": QuantizationSpec(dtype="float8_e4m3fn"),
        "granularity": GROUPS,
    },
    "dkm": {"training_strategy_spec": {"type": "dkm"}},
    "straight through": {"training_strategy_spec": {"type": "straight_through"}},
}


def make_pruned_model(pruned=True):
    model = make_model().eval()
    with torch.no_grad():
        for index in (0, 2) if pruned else ():
            weight = model[index].weight
            weight[weight.abs() < 0.1] = 0
    return model


def palettizer_of(model, **fields):
    return KMeansPalettizer(model, make_config(**fields))


@pytest.fixture
def clusterings(monkeypatch):
    """The calls of k-means that have been made."""
    calls = []
    cluster, kept = _search.Settings.cluster, _search.Settings.scalars
    monkeypatch.setattr(_search.Settings, "cluster", lambda *args: calls.append(args) or cluster(*args))
    monkeypatch.setattr(_search.Settings, "scalars", lambda *args: calls.append(args) or kept(*args))
    return calls


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("pruned", [True, False])
def test_a_checkpoint_in_place_of_clustering(fields, pruned, clusterings):
    model = palettizer_of(make_pruned_model(), **fields).prepare((INPUTS,))
    state, output = state_of(model), model(INPUTS)
    assert clusterings
    clusterings.clear()
    fresh = make_pruned_model(pruned)
    palettizer = palettizer_of(fresh, **fields)
    assert palettizer.prepare((INPUTS,), None, 1, state) is fresh
    assert not clusterings
    assert torch.equal(fresh(INPUTS), output)
    assert list(fresh.state_dict()) == list(state)
    with palettizer.training_mode():
        palettizer.step()


def test_a_checkpoint_brings_its_weights():
    model = prepared()[1]
    fresh = make_model()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    weight = fresh[0].weight
    palettizer_of(fresh).prepare((INPUTS,), state_dict=model.state_dict())
    assert torch.equal(fresh.eval()(INPUTS), model.eval()(INPUTS))
    assert fresh[0].parametrizations.weight.original is weight


def test_a_checkpoint_switches_palettes_on():
    palettizer, model = prepared(schedule=2)
    with palettizer.training_mode():
        state = state_of(model)
    assert not state["0.parametrizations.weight.0.fake_palett_enabled"].any()
    fresh = make_model()
    palettizer_of(fresh, schedule=2).prepare((INPUTS,), state_dict=state)
    assert simulator_of(fresh[0]).is_on()
    assert fresh.state_dict()["0.parametrizations.weight.0.fake_palett_enabled"].tolist() == [1]


def test_a_checkpoint_goes_on_at_its_step():
    palettizer, model = prepared(schedule=2)
    with palettizer.training_mode():
        palettizer.step()
    again = palettizer_of(make_model(), schedule=2)
    fresh = again.prepare((INPUTS,), state_dict=model.state_dict())
    with again.training_mode():
        assert not simulator_of(fresh[0]).is_on()
        again.step()
        assert simulator_of(fresh[0]).is_on()


def test_weights_that_do_not_fit_are_left():
    groups = {"granularity": PerGroupedChannelGranularity(axis=0, group_size=16)}
    model = palettizer_of(make_model(), **groups).prepare((INPUTS,))
    fresh = palettizer_of(make_model(), **groups).prepare((INPUTS,), state_dict=model.state_dict())
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert "2.weight" in fresh.state_dict()


def test_absent_indices_are_found():
    model = prepared()[1]
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("indices")}
    fresh = palettizer_of(make_model()).prepare((INPUTS,), state_dict=state)
    assert torch.equal(fresh(INPUTS), model(INPUTS))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (("centroids",), r"no compression state for 0\.weight, 2\.weight"),
        (("centroids", "indices"), r"no compression state for 0\.weight, 2\.weight"),
        (("0.bias",), r'does not fit the prepared model.*Missing key\(s\).*"0\.bias"'),
        (("original",), "does not fit the prepared model"),
    ],
)
def test_checkpoints_that_lack_something(drop, message):
    state = {name: value for name, value in prepared()[1].state_dict().items() if not name.endswith(drop)}
    model = make_model()
    before = state_of(model)
    palettizer = palettizer_of(model)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        palettizer.prepare((INPUTS,), state_dict=state)
    assert_unchanged(model, before)
    palettizer.prepare((INPUTS,))


def test_checkpoints_of_other_models():
    model = make_model()
    before = state_of(model)
    other = KMeansPalettizer(nn.Sequential(nn.Linear(12, 8)), make_config()).prepare((INPUTS,))
    more = palettizer_of(make_model(), n_bits=3).prepare((INPUTS,))
    for state in (make_model().state_dict(), other.state_dict(), more.state_dict()):
        with pytest.raises(RuntimeError, match="does not fit the prepared model"):
            palettizer_of(model).prepare((INPUTS,), state_dict=state)
        assert_unchanged(model, before)
    with pytest.raises(TypeError, match="state_dict must be a mapping; got int"):
        palettizer_of(model).prepare((INPUTS,), state_dict=3)
    assert_unchanged(model, before)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_finalized_weights_are_dense_and_can_be_palettized_again(fields):
    model = make_pruned_model()
    names, weight = set(model.state_dict()), model[0].weight
    palettizer = palettizer_of(model, **fields)
    palettizer.prepare((INPUTS,))
    twin, output = copy.deepcopy(model), model(INPUTS)
    values = [model[index].weight.detach().clone() for index in (0, 2)]
    assert palettizer.finalize(backend=ExportBackend.Torch) is model
    assert set(model.state_dict()) == names
    assert model[0].weight is weight
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert torch.equal(model(INPUTS), output)
    # Copies are as they were.
    assert torch.equal(twin(INPUTS), output)
    again = palettizer_of(model, **fields)
    again.prepare((INPUTS,))
    if not {"lut_qspec", "enable_per_channel_scale", "cluster_dim"} & set(fields):
        assert [torch.equal(model[index].weight, each) for index, each in zip((0, 2), values, strict=True)]
    again.finalize(backend=ExportBackend.Torch)


def test_palettizing_again_changes_nothing():
    palettizer, model = prepared()
    palettizer.finalize(backend=ExportBackend.Torch)
    weight = model[0].weight.detach().clone()
    again = palettizer_of(model)
    again.prepare((INPUTS,))
    assert torch.equal(model[0].weight, weight)
    with again.calibration_mode(loss_fn=loss_of) as helper:
        helper.step(model(INPUTS), TARGET)
    assert torch.equal(model[0].weight, weight)


def test_pruned_and_finalized_weights_keep_their_zeros():
    model = make_model()
    pruner = MagnitudePruner(model)
    pruner.prepare((INPUTS,))
    with pytest.raises(RuntimeError, match="prepared by a MagnitudePruner"):
        palettizer_of(model).prepare((INPUTS,))
    pruner.finalize(backend=ExportBackend.Torch)
    zeros = model[0].weight == 0
    assert zeros.float().mean() == 0.5
    palettizer = palettizer_of(model, sparsity_detection_threshold=0.4, n_bits=4)
    palettizer.prepare((INPUTS,))
    assert torch.equal(model[0].weight == 0, zeros)
    with palettizer.calibration_mode(loss_fn=loss_of) as helper:
        helper.step(model(INPUTS), TARGET)
    assert torch.equal(model[0].weight == 0, zeros)
    palettizer.finalize(backend=ExportBackend.Torch)
    assert torch.equal(model[0].weight == 0, zeros)
    assert model[0].weight.unique().numel() <= 17


def test_zeros_are_found_when_a_checkpoint_is_loaded():
    """Before the next forward, which may be a compiled one."""
    fields = {"sparsity_detection_threshold": 0.1}
    model = palettizer_of(make_pruned_model(), **fields).prepare((INPUTS,))
    other = palettizer_of(make_pruned_model(pruned=False), **fields).prepare((INPUTS,))
    assert simulator_of(other[0]).sparsity.mask is None
    other.load_state_dict(model.state_dict())
    assert torch.equal(simulator_of(other[0]).sparsity.mask, simulator_of(model[0]).sparsity.mask)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(INPUTS), model(INPUTS))


def test_vectors_that_cannot_be_stored_leave_the_model_alone():
    model = make_pruned_model()
    before = state_of(model)
    columns = PerGroupedChannelGranularity(axis=1, group_size=2)
    palettizer = palettizer_of(model, sparsity_detection_threshold=0.1, cluster_dim=2, granularity=columns)
    with pytest.raises(RuntimeError, match=r"'0\.weight' cannot be clustered: of a pruned weight"):
        palettizer.prepare((INPUTS,))
    assert_unchanged(model, before)


def test_settings_of_vectors_reach_the_simulators():
    config = make_config(cluster_dim=2)
    config.global_config.vector_kmeans_config = {"n_init": 2}
    model = KMeansPalettizer(make_model(), config).prepare((INPUTS,))
    assert simulator_of(model[0]).vector_kmeans_config.n_init == 2
    config.global_config.op_state_spec = {"weight": PalettizationSpec(cluster_dim=2), "bias": None}
    assert simulator_of(prepared()[1][0]).vector_kmeans_config is None
