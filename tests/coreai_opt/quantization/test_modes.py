"""Calibration, training, schedules, switches, and the end."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from coreai_opt import ExportBackend
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer
from coreai_opt.quantization.config import QATSchedule
from coreai_opt.quantization.spec import PerChannelGranularity

from .support import WEIGHTS_ONLY, Mlp, Outer, eager, flags, globally, prepared, simulators

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
AFTERWARDS = (False, True)


def weight_and_activation(model: nn.Module) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    found = flags(model)
    weights = {each for name, each in found.items() if "parametrizations" in name}
    activations = {each for name, each in found.items() if "parametrizations" not in name}
    (weight,), (activation,) = weights, activations
    return weight, activation


def quantizer_of(model: nn.Module) -> Quantizer:
    """A quantizer for a prepared copy."""
    return Quantizer(model, eager())


def test_after_prepare_the_example_was_observed() -> None:
    model = Mlp().eval()
    expected = {"low": X.min(), "high": model.first(X).max()}
    _, model = prepared(model, X)
    assert weight_and_activation(model) == (AFTERWARDS, AFTERWARDS)
    assert model.first.linear_quantize_input.qparams_calculator.running_min == expected["low"]
    assert model.first.linear_quantize_output_0.qparams_calculator.running_max == expected["high"]
    assert not model.training
    assert not model.first.linear_quantize_input.training


def test_prepare_leaves_statistics_and_generators_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    generator = torch.get_rng_state()
    _, model = prepared(model, X)
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(8))
    assert torch.equal(torch.get_rng_state(), generator)
    assert model[2].training


def test_calibration() -> None:
    quantizer, model = prepared(Mlp().train(), X)
    model.second.eval()
    with quantizer.calibration_mode():
        assert weight_and_activation(model) == ((True, True), (True, False))
        assert not model.training
        model(X * 100)
    assert weight_and_activation(model) == (AFTERWARDS, AFTERWARDS)
    assert model.training
    assert not model.second.training
    assert model.first.linear_quantize_input.qparams_calculator.running_max > X.max()


def test_training() -> None:
    quantizer, model = prepared(Mlp().eval(), X)
    with quantizer.training_mode():
        assert weight_and_activation(model) == ((True, True), (True, True))
        assert model.training
    assert weight_and_activation(model) == (AFTERWARDS, AFTERWARDS)
    with pytest.raises(TypeError, match="unexpected keyword"), quantizer.training_mode():
        model(X, wrong=True)
    assert weight_and_activation(model) == (AFTERWARDS, AFTERWARDS)
    assert not model.training


def test_training_twice_and_steps_outside() -> None:
    quantizer, _ = prepared(Mlp(), X)
    again = quantizer.training_mode()
    with quantizer.training_mode(), pytest.raises(RuntimeError, match="active already"), again:
        pass
    with pytest.raises(RuntimeError, match="call it inside of"):
        quantizer.step()


def test_steps_without_a_schedule_warn() -> None:
    quantizer, _ = prepared(Mlp(), X)
    with quantizer.training_mode(), pytest.warns(UserWarning, match="has no effect: no module's"):
        quantizer.step()


def test_schedule() -> None:
    schedule = QATSchedule(enable_observer=1, enable_fake_quant=2, disable_observer=3)
    scheduled = ModuleQuantizerConfig(qat_schedule=schedule)
    quantizer, model = prepared(Mlp(), X, config=eager(module_name_configs={"first": scheduled}))
    seen = []
    with quantizer.training_mode():
        for _ in range(4):
            found = flags(model)
            assert {each for name, each in found.items() if name.startswith("second")} == {(True, True)}
            seen += {each for name, each in found.items() if name.startswith("first")}
            quantizer.step()
    assert seen == [(False, False), (True, False), (True, True), (False, True)]
    with quantizer.training_mode():
        assert flags(model)["first.linear_quantize_input"] == (False, True)


@pytest.mark.parametrize("elsewhere", [None, QATSchedule()])
@pytest.mark.parametrize("own", [None, QATSchedule(enable_fake_quant=100)])
def test_schedules_by_type(own, elsewhere) -> None:
    config = eager(
        global_config=ModuleQuantizerConfig(**WEIGHTS_ONLY, qat_schedule=elsewhere),
        module_type_configs={nn.Linear: ModuleQuantizerConfig(**WEIGHTS_ONLY, qat_schedule=own)},
    )
    quantizer, model = prepared(Mlp(), X, config=config)
    with quantizer.training_mode():
        assert set(flags(model).values()) == {(True, own is None)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.head(self.embedding(i))


@pytest.mark.parametrize("entries", [["head"], ["embedding"], ["embedding", "head"], ["head", "embedding"]])
def test_a_tied_weight_has_the_schedule_of_the_entry_with_its_specification(entries) -> None:
    """Apple's package takes the specification of the last entry and the schedule of the first owner."""

    def entry(name: str) -> ModuleQuantizerConfig:
        late = name == "head"
        spec = QuantizationSpec(dtype="int4" if late else "int8", granularity=PerChannelGranularity(axis=0))
        schedule = QATSchedule(enable_fake_quant=100 if late else 0)
        return ModuleQuantizerConfig(**WEIGHTS_ONLY, op_state_spec={"weight": spec}, qat_schedule=schedule)

    config = eager(global_config=None, module_name_configs={name: entry(name) for name in entries})
    quantizer, model = prepared(Tied(), torch.arange(4), config=config)
    for each in (model, copy.deepcopy(model)):
        with quantizer.training_mode(each):
            (simulator,) = {*simulators(each).values()}
            late = entries[-1] == "head"
            assert simulator.dtype == (torch.int4 if late else torch.int8)
            assert bool(simulator.fake_quant_enabled) is not late


def test_a_step_without_a_change_writes_no_flag() -> None:
    quantizer, model = prepared(Mlp(), X, config=globally(qat_schedule=QATSchedule(disable_observer=5)))
    with quantizer.training_mode():
        versions = [each.observer_enabled._version for each in simulators(model).values()]
        quantizer.step()
        assert versions == [each.observer_enabled._version for each in simulators(model).values()]


def test_switches() -> None:
    quantizer, model = prepared(Mlp(), X)
    quantizer.enable_observer()
    assert set(flags(model).values()) == {(True, True)}
    quantizer.disable_observer(model.first)
    quantizer.disable_fake_quant(model.first.linear_quantize_input)
    assert flags(model)["first.linear_quantize_input"] == (False, False)
    assert flags(model)["first.linear_quantize_output_0"] == (False, True)
    assert flags(model)["second.linear_quantize_input"] == (True, True)
    quantizer.enable_fake_quant()
    quantizer.disable_observer()
    assert set(flags(model).values()) == {AFTERWARDS}
    with pytest.raises(ValueError, match="a Linear from elsewhere"):
        quantizer.enable_observer(nn.Linear(2, 2))


def test_modes_of_a_copy() -> None:
    quantizer, model = prepared(Mlp(), X)
    other = copy.deepcopy(model)
    with quantizer.training_mode(other):
        assert set(flags(model).values()) == {AFTERWARDS}
        assert set(flags(other).values()) == {(True, True)}


def test_finalize_folds_weights_and_keeps_simulated_activations() -> None:
    quantizer, model = prepared(Mlp(), X)
    expected, flags_before = model(X), flags(model)
    assert quantizer.finalize(backend=ExportBackend.Torch) is model
    assert torch.equal(model(X), expected)
    assert not any("parametrizations" in key for key in model.state_dict())
    assert isinstance(model.first.weight, nn.Parameter)
    activations = {name: flag for name, flag in flags_before.items() if "parametrizations" not in name}
    assert flags(model) == activations
    assert len(activations) == 4
    model.first.linear_quantize_input.disable_fake_quant()
    assert not torch.equal(model(X), expected)


def test_a_finalized_model_is_prepared_no_more() -> None:
    quantizer, _ = prepared(Mlp(), X)
    quantizer.finalize(backend="torch")
    for refused in (
        lambda: quantizer.finalize(backend="torch"),
        lambda: quantizer.calibration_mode().__enter__(),
        lambda: quantizer.training_mode().__enter__(),
        quantizer.step,
    ):
        with pytest.raises(RuntimeError):
            refused()


def test_finalizing_a_copy_leaves_the_model_whole() -> None:
    quantizer, model = prepared(Mlp(), X)
    twin, expected, keys = copy.deepcopy(model), model(X), list(model.state_dict())
    quantizer.finalize(twin, ExportBackend.Torch)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), expected)
    assert torch.equal(twin(X), expected)
    with quantizer.calibration_mode():
        model(X)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    quantizer, model = prepared(Mlp(), X)
    target = torch.randn(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with quantizer.training_mode():
        for _ in range(20):
            optimizer.zero_grad()
            loss = (model(X) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_checkpoints_load_into_a_prepared_model() -> None:
    _, model = prepared(Mlp(), X)
    _, other = prepared(Mlp(), X * 3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize(("make", "config"), [(Mlp, WEIGHTS_ONLY), (Outer, {})])
def test_prepared_models_compile_as_one_graph(make, config) -> None:
    torch._dynamo.reset()
    _, model = prepared(make(), X, config=globally(**config))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(X)
    out = compiled(X)
    assert torch.equal(out, expected)
    gradients = [torch.autograd.grad(each.sum(), list(model.parameters())) for each in (out, expected)]
    assert all(map(torch.equal, *gradients))


def test_a_compiled_training_step_observes() -> None:
    torch._dynamo.reset()
    quantizer, model = prepared(Mlp(), X)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with quantizer.training_mode(), quantizer_of(other).training_mode():
        for scale in (1.0, 3.0):
            assert torch.equal(compiled(X * scale), other(X * scale))
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("trains", [False, True])
def test_batches_of_any_length_are_compiled_twice(trains) -> None:
    torch._dynamo.reset()
    quantizer, model = prepared(Outer(), X)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with ExitStack() as stack:
        if trains:
            stack.enter_context(quantizer.training_mode())
            stack.enter_context(quantizer_of(twin).training_mode())
        for length in (4, 5, 7, 9, 3):
            batch = X[:1].repeat(length, 1) * length
            assert torch.equal(compiled(batch), twin(batch))
    assert counter.frame_count == 2


def test_without_observers_checkpointed_activations_are_the_same() -> None:
    """With them, what is computed anew is observed a second time, as the page about language models says."""

    class Checkpointed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=False).relu())

    gradients = []
    for kind in (Mlp, Checkpointed):
        torch.manual_seed(0)
        quantizer, model = prepared(kind(), X)
        with quantizer.calibration_mode():
            model(X)
        with quantizer.training_mode():
            quantizer.disable_observer()
            for i in range(1, 4):
                model(i * X).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
