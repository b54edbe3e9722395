"""Life of a prepared graph: what prepare gives, calibration, training, copies, checkpoints."""

import copy
import functools
import logging

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization._graph import preparation
from coreai_opt.quantization.config import QATSchedule
from coreai_opt.quantization.spec import PerBlockGranularity

from .support import flags, mlp, only, prepared, simulators, x

AFTERWARDS = (False, True)
NAMES = [f"activation_post_process_{number}" for number in range(5)]
WEIGHTS = ("activation_post_process_1", "activation_post_process_3")


def test_the_default_configuration_prepares_a_graph() -> None:
    model = mlp()
    quantizer = Quantizer(model)
    found = quantizer.prepare((x(2, 4),))
    assert isinstance(found, GraphModule)
    assert sorted(simulators(found)) == NAMES
    assert set(flags(found).values()) == {AFTERWARDS}
    assert found.get_parameter("0.weight") is model[0].weight
    assert found(x(2, 4)).shape == (2, 3)


def test_the_example_was_observed() -> None:
    model, inputs = mlp(), x(2, 4)
    _, found = prepared(model, inputs)
    calculator = simulators(found)[NAMES[0]].qparams_calculator
    assert calculator.running_min == inputs.min()
    assert calculator.running_max == inputs.max()


def test_calibration_observes_activations_and_simulates_weights() -> None:
    quantizer, found = prepared(mlp(), x(2, 4))
    before = simulators(found)[NAMES[0]].qparams_calculator.scale.clone()
    with quantizer.calibration_mode():
        during = flags(found)
        assert not found.training
        found(10 * x(8, 4))
    assert {during[name] for name in WEIGHTS} == {(True, True)}
    assert {during[name] for name in set(NAMES) - set(WEIGHTS)} == {(True, False)}
    assert set(flags(found).values()) == {AFTERWARDS}
    assert found.training
    assert simulators(found)[NAMES[0]].qparams_calculator.scale > before


def test_training_trains_the_models_own_parameters() -> None:
    model = mlp().eval()
    before = model[0].weight.detach().clone()
    quantizer, found = prepared(model, x(2, 4))
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    with quantizer.training_mode():
        assert found.training
        assert set(flags(found).values()) == {(True, True)}
        found(x(8, 4)).square().sum().backward()
        optimizer.step()
    assert not found.training
    assert not torch.equal(model[0].weight, before)


def test_steps_outside_of_training_and_contexts_before_prepare_are_refused() -> None:
    quantizer = Quantizer(mlp())
    for context in (quantizer.calibration_mode, quantizer.training_mode):
        with pytest.raises(RuntimeError, match="not prepared"), context():
            pass
    with pytest.raises(RuntimeError, match="training_mode"):
        quantizer.step()
    with pytest.raises(RuntimeError, match="not prepared"):
        quantizer.finalize()


def test_a_model_is_prepared_once() -> None:
    quantizer, found = prepared(mlp(), x(2, 4))
    with pytest.raises(RuntimeError, match="prepared already"):
        quantizer.prepare((x(2, 4),))
    with pytest.raises(RuntimeError, match="prepared already"):
        Quantizer(found).prepare((x(2, 4),))


def test_a_deep_copy_lives_a_life_of_its_own() -> None:
    quantizer, found = prepared(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)), x(2, 4))
    twin = copy.deepcopy(found)
    twin.eval()
    assert found.training
    assert torch.equal(twin(x(2, 4)), twin(x(2, 4)))
    with quantizer.calibration_mode(twin):
        twin(100 * x(2, 4))
    scales = [simulators(each)[NAMES[0]].qparams_calculator.scale for each in (twin, found)]
    assert scales[0] > scales[1]


def test_contexts_take_prepared_graphs_only() -> None:
    quantizer, _ = prepared(mlp(), x(2, 4))
    with pytest.raises(TypeError, match="GraphModule"), quantizer.calibration_mode(mlp()):
        pass


def test_a_checkpoint_continues_in_a_model_prepared_alike() -> None:
    quantizer, found = prepared(mlp(), x(2, 4))
    with quantizer.calibration_mode():
        found(5 * x(8, 4))
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    again = Quantizer(model).prepare((torch.zeros(2, 4),), state_dict=found.state_dict())
    assert torch.equal(again(x(3, 4)), found(x(3, 4)))
    assert set(flags(again).values()) == {AFTERWARDS}


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_foreign_checkpoint_is_refused_and_leaves_the_model(change: str) -> None:
    _, found = prepared(nn.Sequential(*mlp(), nn.BatchNorm1d(3)), x(2, 4))
    state = {name: 2 * tensor for name, tensor in found.state_dict().items()}
    if change == "missing":
        del state["0.bias"]
    elif change == "unexpected":
        state["more"] = torch.ones(1)
    else:
        state["2.bias"] = torch.ones(7)
    model = nn.Sequential(*mlp(), nn.BatchNorm1d(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="state_dict"):
        Quantizer(model).prepare((x(2, 4),), state_dict=state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_blocks_do_not_divide_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    spec = QuantizationSpec(granularity=PerBlockGranularity(block_size=4))
    config = QuantizerConfig(global_config=only(op_state_spec={"weight": spec}))
    with caplog.at_level(logging.WARNING):
        _, found = prepared(mlp(), x(2, 4), config=config)
    assert list(simulators(found)) == [NAMES[0]]
    assert "2.weight" in caplog.text


def test_a_schedule_switches_the_quantizers_of_its_modules() -> None:
    schedule = QATSchedule(enable_observer=0, enable_fake_quant=1, disable_observer=2)
    config = QuantizerConfig(module_name_configs={"2": ModuleQuantizerConfig(qat_schedule=schedule)})
    quantizer, found = prepared(mlp(), x(2, 4), config=config)
    own = {"activation_post_process_2", "activation_post_process_3", "activation_post_process_4"}
    seen = []
    with quantizer.training_mode():
        for _ in range(3):
            found(x(2, 4))
            seen.append({flags(found)[name] for name in own})
            quantizer.step()
        assert {flags(found)[name] for name in set(NAMES) - own} == {(True, True)}
    assert seen == [{(True, False)}, {(True, True)}, {(False, True)}]
    with pytest.raises(RuntimeError, match="qat_schedule"):
        quantizer.disable_observer()


def test_switches_reach_the_quantizers_of_a_module() -> None:
    quantizer, found = prepared(mlp(), x(2, 4))
    quantizer.disable_fake_quant(found.get_submodule("2"))
    off = {name for name, (_, simulates) in flags(found).items() if not simulates}
    assert off == {"activation_post_process_3", "activation_post_process_4"}
    quantizer.enable_fake_quant(found)
    assert set(flags(found).values()) == {AFTERWARDS}
    with pytest.raises(ValueError, match="part of the prepared model"):
        quantizer.disable_fake_quant(nn.Linear(2, 2))


def test_preserved_attributes_come_along(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    model.labels = ["a", "b"]
    config = QuantizerConfig(preserved_attributes=["labels", "colour"])
    with caplog.at_level(logging.WARNING):
        _, found = prepared(model, x(2, 4), config=config)
    assert found.labels == ["a", "b"]
    assert copy.deepcopy(found).labels == ["a", "b"]
    assert "colour" in caplog.text


def test_long_preparations_show_what_they_are_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(mlp(), x(2, 4))
    assert not capsys.readouterr().err
    monkeypatch.setattr(preparation, "_SECONDS_WITHOUT_A_BAR", 0)
    monkeypatch.setattr(preparation, "tqdm", functools.partial(preparation.tqdm, mininterval=0))
    prepared(mlp(), x(2, 4))
    shown = capsys.readouterr().err
    for stage in ("Exporting", "Placing", "Observing"):
        assert stage in shown
