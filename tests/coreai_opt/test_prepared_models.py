"""What prepared models carry through checkpoints and copies; prepare with a state."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.palettization import KMeansPalettizer, KMeansPalettizerConfig, ModuleKMeansPalettizerConfig
from coreai_opt.palettization.config import PATSchedule
from coreai_opt.pruning import MagnitudePruner
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.config import QATSchedule

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MARK = "_coreai_opt_prepared"


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def quantizer(model, schedule=None):
    config = ModuleQuantizerConfig(qat_schedule=schedule)
    return Quantizer(model, QuantizerConfig(global_config=config, execution_mode="eager"))


def palettizer(model, schedule=None):
    config = ModuleKMeansPalettizerConfig(pat_schedule=schedule)
    return KMeansPalettizer(model, KMeansPalettizerConfig(global_config=config))


COMPRESSORS = [quantizer, MagnitudePruner, palettizer]


def through_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("compressor", COMPRESSORS)
class TestMark:
    def test_it_is_a_buffer_outside_of_states(self, compressor):
        model = make_model()
        compressor(model).prepare((X,))
        buffer = dict(model.named_buffers())[MARK]
        assert (buffer.dtype, tuple(buffer.shape), bool(buffer)) == (torch.bool, (), True)
        assert MARK not in model.state_dict()

    def test_copies_and_pickles_are_prepared(self, compressor):
        model = make_model()
        made = compressor(model)
        made.prepare((X,))
        twin = copy.deepcopy(model)
        made.finalize(twin, backend=ExportBackend.Torch)
        assert hasattr(model, MARK)
        assert not hasattr(twin, MARK)
        assert torch.equal(twin(X), model.eval()(X))

    def test_the_life_of_a_model(self, compressor):
        model = make_model()
        made = compressor(model)
        for early in (made.step, lambda: made.finalize(backend=ExportBackend.Torch)):
            with pytest.raises(RuntimeError):
                early()
        assert made.prepare((X,)) is model
        with pytest.raises(RuntimeError, match="prepared already"):
            made.prepare((X,))
        with pytest.raises(RuntimeError, match="prepared already"):
            compressor(model).prepare((X,))
        expected = model.eval()(X)
        made.finalize(backend=ExportBackend.Torch)
        assert not hasattr(model, MARK)
        assert torch.equal(model(X), expected)
        assert not [key for key in model.state_dict() if "parametrizations" in key]
        for late in (made.step, lambda: made.finalize(backend=ExportBackend.Torch)):
            with pytest.raises(RuntimeError):
                late()

    def test_a_finalized_model_leaves_nothing_behind(self, compressor):
        model = make_model()
        before = set(model.__dict__)
        made = compressor(model)
        made.prepare((X,))
        made.finalize(backend=ExportBackend.Torch)
        # The quantizer's activations go on being simulated: what they are from is needed to save them.
        assert set(model.__dict__) - before <= {"_coreai_opt_finalized"}
        assert before <= set(model.__dict__)
        hooks = ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
        assert not any(getattr(model, name) for name in hooks)


def test_weights_can_be_compressed_again():
    model = make_model()
    for compressor in (MagnitudePruner, palettizer, MagnitudePruner, quantizer):
        made = compressor(model)
        made.prepare((X,))
        made.finalize(backend=ExportBackend.Torch)
    assert (model[0].weight == 0).float().mean() >= 0.5
    with pytest.raises(RuntimeError, match="the name of a simulator to be put there"):
        quantizer(model).prepare((X,))


def test_pruning_comes_first():
    model = make_model()
    palettizer(model).prepare((X,))
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match="Pruning comes first"):
        MagnitudePruner(model).prepare((X,))
    assert list(model.state_dict()) == before


def simulates(model):
    return [int(each.fake_quant_enabled) for each in model.modules() if hasattr(each, "fake_quant_enabled")]


def prepared(compressor, schedule, seed=0):
    model = make_model(seed)
    made = compressor(model, schedule)
    made.prepare((X,))
    return model, made


def advance(made, steps):
    with made.training_mode():
        for _ in range(steps):
            made.step()


SCHEDULED = [
    (quantizer, QATSchedule(enable_fake_quant=5)),
    (palettizer, PATSchedule(enable_fake_palettize=5)),
]


@pytest.mark.parametrize(("compressor", "schedule"), SCHEDULED)
class TestSteps:
    def test_they_are_in_the_models_checkpoint(self, compressor, schedule):
        model, made = prepared(compressor, schedule)
        advance(made, 3)
        resumed, other = prepared(compressor, schedule, seed=1)
        resumed.load_state_dict(through_save(model.state_dict()), strict=True)
        assert other._step_count == 3
        advance(other, 1)
        assert other._step_count == 4

    def test_inside_of_other_modules_too(self, compressor, schedule):
        model, made = prepared(compressor, schedule)
        advance(made, 3)
        resumed, other = prepared(compressor, schedule)
        state = nn.ModuleDict({"net": model}).state_dict()
        nn.ModuleDict({"net": resumed}).load_state_dict(through_save(state))
        assert other._step_count == 3

    def test_through_prepare(self, compressor, schedule):
        model, made = prepared(compressor, schedule)
        advance(made, 3)
        resumed = make_model(1)
        other = compressor(resumed, schedule)
        other.prepare((X,), state_dict=through_save(model.state_dict()))
        assert other._step_count == 3
        originals = [each[0].parametrizations.weight.original for each in (model, resumed)]
        assert torch.equal(*originals)

    def test_the_compressors_own_state(self, compressor, schedule):
        model, made = prepared(compressor, schedule)
        advance(made, 3)
        state = through_save(made.state_dict())
        assert state["step_count"] == 3
        tensors = safetensors.torch.load(safetensors.torch.save(dict(model.state_dict())))
        resumed, other = prepared(compressor, schedule)
        resumed.load_state_dict(tensors)
        assert other._step_count == 0
        other.load_state_dict(state)
        assert other._step_count == 3
        with pytest.warns(UserWarning, match="another configuration"):
            prepared(compressor, None)[1].load_state_dict(state)
        with pytest.raises(ValueError, match=r"state_dict\['step_count'\]"):
            other.load_state_dict({"step_count": -1})
        with pytest.raises(RuntimeError, match="not prepared"):
            compressor(make_model(), schedule).load_state_dict(state)

    def test_a_state_without_steps_leaves_them(self, compressor, schedule):
        model, made = prepared(compressor, schedule)
        advance(made, 3)
        model.load_state_dict(dict(model.state_dict()))
        assert made._step_count == 3

    def test_copies_and_pickles_go_on(self, compressor, schedule):
        model, made = prepared(compressor, schedule)
        advance(made, 3)
        assert compressor(copy.deepcopy(model), schedule)._step_count == 3
        assert compressor(pickle.loads(pickle.dumps(model.state_dict()))._metadata and model)._step_count == 3


def test_a_schedule_goes_on_in_its_middle():
    """U12: the simulation begins at the fifth step altogether."""
    schedule = QATSchedule(enable_observer=1, enable_fake_quant=5, disable_observer=7)
    model, made = prepared(quantizer, schedule)
    advance(made, 3)
    resumed, other = prepared(quantizer, schedule)
    resumed.load_state_dict(through_save(model.state_dict()))
    seen = []
    with other.training_mode():
        for _ in range(4):
            seen.append(set(simulates(resumed)))
            other.step()
    assert seen == [{0}, {0}, {1}, {1}]


def test_steps_in_graph_mode():
    config = ModuleQuantizerConfig(qat_schedule=QATSchedule(enable_fake_quant=5))

    def graph(**arguments):
        made = Quantizer(make_model(), QuantizerConfig(global_config=config))
        return made.prepare((X,), **arguments), made

    model, made = graph()
    advance(made, 3)
    assert Quantizer(copy.deepcopy(model), QuantizerConfig(global_config=config))._step_count == 3
    state = through_save(model.state_dict())
    resumed, other = graph()
    resumed.load_state_dict(state, strict=True)
    assert other._step_count == 3
    assert graph(state_dict=state)[1]._step_count == 3
    finalized = made.finalize(backend=ExportBackend.Torch)
    assert not hasattr(finalized, MARK)


def test_a_step_that_is_loaded_in_training_applies_at_once():
    model, made = prepared(quantizer, QATSchedule(enable_fake_quant=5))
    with made.training_mode():
        assert set(simulates(model)) == {0}
        made.load_state_dict({"step_count": 5})
        assert set(simulates(model)) == {1}


def test_a_copy_in_training_counts_its_own_steps():
    model, made = prepared(quantizer, QATSchedule(enable_fake_quant=2))
    twin = copy.deepcopy(model)
    with made.training_mode(twin):
        made.step()
        made.step()
        assert made._step_count == 2
        assert set(simulates(twin)) == {1}
    assert made._step_count == 0


class TestQuantizerPreparedWithAState:
    def saved(self):
        model, made = prepared(quantizer, None)
        with made.calibration_mode():
            model(X * 3)
        return model

    def test_what_was_observed_is_that_of_the_state(self):
        """P: with all-zero example inputs, flags that were saved otherwise, and other weights."""
        model = self.saved()
        expected, state = model.eval()(X), model.state_dict()
        for name in state:
            if name.endswith("observer_enabled"):
                state[name] = torch.ones_like(state[name])
            elif name.endswith("fake_quant_enabled"):
                state[name] = torch.zeros_like(state[name])
        resumed = make_model(3)
        weight = resumed[0].weight
        quantizer(resumed).prepare((torch.zeros(1, 8),), state_dict=state)
        assert torch.equal(resumed.eval()(X), expected)
        assert resumed[0].parametrizations.weight.original is weight
        assert set(simulates(resumed)) == {1}
        assert {
            int(each.observer_enabled) for each in resumed.modules() if hasattr(each, "observer_enabled")
        } == {0}

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda state: state.pop("0.linear_quantize_input.qparams_calculator.running_min"),
            lambda state: state.update(nothing=torch.zeros(1)),
            lambda state: state.update({"0.bias": torch.zeros(5)}),
            lambda state: [state.pop(name) for name in list(state) if "quantize" in name],
        ],
        ids=["a key less", "a key more", "another shape", "no activations"],
    )
    def test_what_does_not_fit_leaves_the_model_as_it_was(self, spoil):
        state = dict(self.saved().state_dict())
        spoil(state)
        model = make_model(3)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        attributes = [set(module.__dict__) for module in model.modules()]
        made = quantizer(model)
        with pytest.raises(RuntimeError, match="state_dict does not fit the prepared model"):
            made.prepare((X,), state_dict=state)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert [set(module.__dict__) for module in model.modules()] == attributes
        assert not hasattr(model, MARK)
        made.prepare((X,))

    def test_a_state_from_before_anything_was_observed(self):
        state = self.saved().state_dict()
        name = "0.parametrizations.weight.0.qparams_calculator"
        for key in [key for key in state if key.startswith(name)]:
            state[key] = torch.empty(0)
        with pytest.raises(RuntimeError, match=r"(?s)does not fit.*size mismatch for 0\.parametrizations"):
            quantizer(make_model()).prepare((X,), state_dict=state)

    def test_it_is_given_by_keyword(self):
        with pytest.raises(TypeError, match="positional"):
            quantizer(make_model()).prepare((X,), None, True, {})
        with pytest.raises(TypeError, match="must be a mapping"):
            quantizer(make_model()).prepare((X,), state_dict=3)
