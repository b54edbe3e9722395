"""The compressor: which weights, schedules, calibration, sensitivities, and the end of training."""

import copy
import logging

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
from coreai_opt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from coreai_opt.palettization.config import OpKMeansPalettizerConfig
from coreai_opt.palettization.spec import PerGroupedChannelGranularity


def test_prepare_changes_the_model_in_place():
    model = make_model()
    state = state_of(model)
    palettizer = KMeansPalettizer(model, make_config())
    assert palettizer.prepare((INPUTS,)) is model
    for index in (0, 2):
        assert model[index].weight.unique().numel() == 4
        assert simulator_of(model[index]).tensor_fqn == f"{index}.weight"
        assert torch.equal(model[index].parametrizations.weight.original, state[f"{index}.weight"])


def test_prepare_leaves_statistics_alone():
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))
    KMeansPalettizer(model, make_config()).prepare((INPUTS,))
    assert model[1].num_batches_tracked == 0
    assert not model[1].running_mean.any()


def test_the_default_is_four_bits():
    model = KMeansPalettizer(make_model()).prepare((INPUTS,))
    assert model[0].weight.unique().numel() == 16


def test_several_workers_find_the_same():
    one = prepared()[1]
    two = KMeansPalettizer(make_model(), make_config()).prepare((INPUTS,), num_workers=3)
    assert all(torch.equal(one.state_dict()[name], value) for name, value in two.state_dict().items())


def test_configurations_choose():
    config = make_config()
    config.set_module_name("2", None)
    assert not parametrize.is_parametrized(KMeansPalettizer(make_model(), config).prepare((INPUTS,))[2])
    by_type = ModuleKMeansPalettizerConfig(
        op_state_spec=None,
        op_type_config={
            "linear": OpKMeansPalettizerConfig(op_state_spec={"weight": PalettizationSpec(n_bits=1)})
        },
    )
    model = KMeansPalettizer(make_model(), KMeansPalettizerConfig(global_config=by_type)).prepare((INPUTS,))
    assert model[0].weight.unique().numel() == 2


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_groups_lie_along_output_channels(axis):
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 4, 1))
    groups = PerGroupedChannelGranularity(axis=axis, group_size=2)
    KMeansPalettizer(model, make_config(granularity=groups)).prepare((torch.randn(1, 4, 5, 5),))
    found = [simulator_of(module).granularity.axis for module in model]
    assert found == ([0, 1] if axis is None else [axis, axis])


def test_attention():
    model = nn.MultiheadAttention(8, 2)
    model = KMeansPalettizer(model, KMeansPalettizerConfig()).prepare((torch.randn(3, 1, 8),) * 3)
    assert model.in_proj_weight.unique().numel() == 16
    assert model.out_proj.weight.unique().numel() == 16


def test_a_shared_weight_has_one_simulator():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    palettizer = KMeansPalettizer(model, make_config(training_strategy_spec={"type": "straight_through"}))
    palettizer.prepare((torch.randn(2, 8),))
    assert simulator_of(model[0]) is simulator_of(model[1])
    before = simulator_of(model[0]).centroids.clone()
    with palettizer.training_mode(), torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2)
        palettizer.step()
    assert torch.allclose(simulator_of(model[0]).centroids, 2 * before, atol=0.3)


def test_weights_that_do_not_fit_are_left(caplog):
    groups = PerGroupedChannelGranularity(axis=0, group_size=16)
    palettizer = KMeansPalettizer(make_model(), make_config(granularity=groups))
    with caplog.at_level(logging.WARNING):
        model = palettizer.prepare((INPUTS,))
    assert parametrize.is_parametrized(model[0])
    assert not parametrize.is_parametrized(model[2])
    assert "'2.weight': size 4 of axis 0 is not divisible by group_size 16" in caplog.text


def test_empty_weights_are_left(caplog):
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    with caplog.at_level(logging.WARNING):
        KMeansPalettizer(model, make_config()).prepare((torch.randn(2, 4),))
    assert not any(parametrize.is_parametrized(module) for module in model)
    assert "0.weight has a specification" in caplog.text


def test_a_model_without_weights(caplog):
    palettizer = KMeansPalettizer(nn.ReLU())
    model = palettizer.prepare((INPUTS,))
    assert "Nothing is palettized" in caplog.text
    with palettizer.training_mode():
        palettizer.step()
    assert palettizer.finalize(backend=ExportBackend.Torch) is model


def test_order_of_calls():
    palettizer = KMeansPalettizer(make_model(), make_config())
    for call in (
        lambda: palettizer.training_mode().__enter__(),
        lambda: palettizer.calibration_mode(loss_fn=loss_of).__enter__(),
        lambda: palettizer.save_sensitivities("unused"),
        lambda: palettizer.finalize(backend=ExportBackend.Torch),
    ):
        with pytest.raises(RuntimeError, match="not prepared"):
            call()
    with pytest.raises(RuntimeError, match="training_mode"):
        palettizer.step()
    palettizer.prepare((INPUTS,))
    with pytest.raises(RuntimeError, match="prepared already"):
        palettizer.prepare((INPUTS,))
    with pytest.raises(RuntimeError, match="prepared already"):
        KMeansPalettizer(palettizer._model, make_config()).prepare((INPUTS,))
    with pytest.raises(RuntimeError, match="training_mode"):
        palettizer.step()


def test_bad_arguments(tmp_path):
    model = make_model()
    state = state_of(model)
    palettizer = KMeansPalettizer(model, make_config())
    for workers, error in ((0, ValueError), (-1, ValueError), ("2", TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="num_workers"):
            palettizer.prepare((INPUTS,), num_workers=workers)
    with pytest.raises(TypeError, match="example_inputs"):
        palettizer.prepare(INPUTS)
    with pytest.raises(FileNotFoundError):
        palettizer.prepare((INPUTS,), tmp_path / "missing.pt")
    assert_unchanged(model, state)
    with pytest.raises(TypeError):
        KMeansPalettizer(make_model(), ModuleKMeansPalettizerConfig())
    with pytest.raises(TypeError):
        KMeansPalettizer(INPUTS)


def test_a_weight_that_is_not_finite_leaves_the_model_alone():
    model = make_model()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    palettizer = KMeansPalettizer(model, make_config())
    with pytest.raises(ValueError, match=r"'2\.weight' cannot be clustered"):
        palettizer.prepare((INPUTS,))
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    with torch.no_grad():
        model[2].weight[0, 0] = 0
    assert parametrize.is_parametrized(palettizer.prepare((INPUTS,))[2])


def test_schedule():
    palettizer, model = prepared(schedule=2)
    simulator = simulator_of(model[0])
    first = simulator.centroids.clone()
    with palettizer.training_mode() as entered:
        assert entered is palettizer
        for step in range(4):
            assert simulator.is_on() == (step >= 2)
            assert model[0].weight.requires_grad == (step < 2)
            with torch.no_grad():
                model[0].parametrizations.weight.original.mul_(2)
            palettizer.step()
    # Clustered anew at the second step, when the weight had doubled twice; not afterwards.
    assert torch.allclose(simulator.centroids, 4 * first)
    with palettizer.training_mode():
        assert simulator.is_on()


def train(palettizer, model, steps=30, forward=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    with palettizer.training_mode():
        for _ in range(steps):
            loss = loss_of((forward or model)(INPUTS), TARGET)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            palettizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["default", "straight_through", "dkm"])
def test_training(strategy):
    palettizer, model = prepared(training_strategy_spec={"type": strategy})
    original = model[0].parametrizations.weight.original.clone()
    losses = train(palettizer, model)
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(original, model[0].parametrizations.weight.original) == (strategy == "default")
    final = palettizer.finalize(backend=ExportBackend.Torch)
    assert final is model
    assert final[0].weight.unique().numel() <= 4
    assert final.train()[0].weight.unique().numel() <= 4
    with pytest.raises(RuntimeError, match="not prepared"):
        palettizer.finalize(backend=ExportBackend.Torch)


@pytest.mark.parametrize("strategy", ["default", "straight_through", "dkm"])
def test_a_checkpoint_in_training_is_up_to_date(strategy):
    palettizer, model = prepared(training_strategy_spec={"type": strategy})
    train(palettizer, model, steps=3)
    _, fresh = prepared(training_strategy_spec={"type": "default"})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("strategy", ["default", "straight_through", "dkm"])
def test_training_compiles(strategy):
    torch._dynamo.reset()
    eager = train(*prepared(training_strategy_spec={"type": strategy}), steps=3)
    palettizer, model = prepared(training_strategy_spec={"type": strategy})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert train(palettizer, model, steps=3, forward=compiled) == pytest.approx(eager, rel=1e-5)


@pytest.mark.parametrize("strategy", ["default", "straight_through", "dkm"])
def test_a_training_step_reads_nothing_on_the_host(strategy, host_reads):
    palettizer, model = prepared(schedule=0, training_strategy_spec={"type": strategy})
    model(INPUTS)
    with palettizer.training_mode(), host_reads:
        loss_of(model(INPUTS), TARGET).backward()
        palettizer.step()
    assert not host_reads.seen


def test_finalizing():
    palettizer, model = prepared()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="mmap_dir"):
        palettizer.finalize(backend=ExportBackend.Torch, mmap_dir="folder")
    with pytest.raises(TypeError):
        palettizer.finalize(INPUTS, backend=ExportBackend.Torch)
    with pytest.raises(RuntimeError, match="not prepared"):
        palettizer.finalize(make_model(), backend=ExportBackend.Torch)
    assert palettizer.finalize(twin, backend=ExportBackend.Torch) is twin
    assert torch.equal(twin.eval()(INPUTS), model.eval()(INPUTS))
    assert palettizer.finalize(backend=ExportBackend.Torch) is model


def test_names_of_operations():
    resolve = KMeansPalettizer.get_op_type_resolver()
    assert resolve(nn.functional.linear) == "linear"
    assert resolve(nn.functional.relu) is None
    assert nn.Linear in KMeansPalettizer.supported_modules()
    assert nn.Embedding not in KMeansPalettizer.supported_modules()
