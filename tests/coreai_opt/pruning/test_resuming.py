"""Pruning that goes on from a checkpoint: of a model, of a pruner, of earlier versions, through prepare."""

import io
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from pruned_models import RAMP, TORCH, Net, everywhere, simulators, sparsities, train
from torch import nn

from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.spec import BlockStructured, NMStructured, PruneImplBase


def through_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SPECS = {
    "unstructured": PruningSpec(target_sparsity=0.8),
    "blocks": PruningSpec(target_sparsity=0.5, pruning_scheme=BlockStructured(block_size=(2, -1))),
    "n:m": PruningSpec(pruning_scheme=NMStructured()),
}


def through_safetensors(state):
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


@pytest.mark.parametrize("scheme", ["unstructured", "under one threshold", "blocks", "n:m"])
@pytest.mark.parametrize("transfer", [through_save, through_safetensors])
@pytest.mark.parametrize("into", ["a prepared model", "prepare"])
@pytest.mark.parametrize("steps", [0, 3, 5, 12])
def test_training_goes_on_from_a_checkpoint_as_if_uninterrupted(x, scheme, transfer, into, steps):
    spec = SPECS.get(scheme, SPECS["unstructured"])
    config = everywhere(spec, RAMP, global_threshold=scheme == "under one threshold")
    if scheme in ("blocks", "n:m"):
        config.set_global(None).set_module_type(
            nn.Linear, ModuleMagnitudePrunerConfig(op_state_spec={"weight": spec}, sparsity_schedule=RAMP)
        )

    def prepared(seed, **arguments):
        torch.manual_seed(seed)
        model = Net().eval()
        pruner = MagnitudePruner(model, config)
        pruner.prepare((x,), **arguments)
        return model, pruner

    model, pruner = prepared(0)
    train(model, pruner, x, steps)
    checkpoint = transfer(model.state_dict())

    if into == "prepare":
        resumed, other = prepared(1, state_dict=checkpoint)
    else:
        resumed, other = prepared(1)
        resumed.load_state_dict(checkpoint)
    assert other._step_count == steps
    assert train(model, pruner, x, 8, seed=9) == train(resumed, other, x, 8, seed=9)
    first, second = model.state_dict(), resumed.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert sparsities(model) == sparsities(resumed)


def steps_of(model):
    return {each.steps() for each in simulators(model).values()}


def test_steps_are_counted_without_a_schedule_too(model, x):
    pruner = MagnitudePruner(model)
    assert pruner._step_count == 0
    pruner.prepare((x,))
    for _ in range(3):
        pruner.step()
    assert steps_of(model) == {3}
    assert pruner._step_count == 3
    with pytest.raises(AttributeError):
        pruner._step_count = 5


def test_the_pruners_own_state(model, x):
    config = everywhere(PruningSpec(target_sparsity=0.75), RAMP)
    pruner = MagnitudePruner(model, config)
    with pytest.raises(RuntimeError, match="load_state_dict: the model is not prepared"):
        pruner.load_state_dict({"step_count": 1})
    pruner.prepare((x,))
    train(model, pruner, x, 5)
    expected, state = sparsities(model), through_save(pruner.state_dict())
    assert state["step_count"] == 5
    train(model, pruner, x, 1)
    pruner.load_state_dict(state)
    assert sparsities(model) == expected
    assert steps_of(model) == {5}
    pruner.load_state_dict({name: {"step_count": 2} for name in simulators(model)})
    assert steps_of(model) == {2}
    for wrong in ({}, {"step_count": -1}, {"step_count": 1.5}, {"step_count": True}, {"fc.weight": {}}):
        with pytest.raises(ValueError, match=r"state_dict\['step_count'\] must be a number of steps"):
            pruner.load_state_dict(wrong)
    assert steps_of(model) == {2}


def test_a_state_of_another_configuration_warns(model, x):
    pruner = MagnitudePruner(model, everywhere(PruningSpec(), RAMP))
    pruner.prepare((x,))
    state = MagnitudePruner(Net(), everywhere(PruningSpec(target_sparsity=0.1), RAMP)).state_dict()
    with pytest.warns(UserWarning, match="MagnitudePruner with another configuration"):
        pruner.load_state_dict(state)


def test_different_steps_in_a_state_are_an_error_after_loading(model, x):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    state = model.state_dict()
    names = [name for name in state if name.endswith("step_count")]
    for name, steps in zip(names, (7, 3, 3), strict=True):
        state[name] = torch.tensor(steps)
    with pytest.raises(RuntimeError, match=r"same step_count; the loaded state has \[3, 7\]"):
        model.load_state_dict(state)
    assert steps_of(model) == {3, 7}
    for name in names:
        state[name] = torch.tensor(4)
    model.load_state_dict(state)
    assert pruner._step_count == 4
    pruner.finalize(backend=TORCH)
    model.load_state_dict(model.state_dict())


def test_checkpoints_of_earlier_versions_load_and_say_so(model, x, caplog):
    """Of 0.3.0, without steps; and of this package, with the steps of scheduled tensors in the metadata."""
    scheduled = ModuleMagnitudePrunerConfig(sparsity_schedule=RAMP)
    config = MagnitudePrunerConfig(module_type_configs={nn.Linear: scheduled})
    pruner = MagnitudePruner(model, config)
    pruner.prepare((x,))
    state = model.state_dict()
    for name in [name for name in state if name.endswith("step_count")]:
        del state[name]
    for place, metadata in state._metadata.items():
        if place.endswith("parametrizations.weight.0"):
            metadata["pruning"] = {"step_count": 0 if place.startswith("conv") else 5, "sparsity": 0.4}
    caplog.clear()
    model.load_state_dict(through_save(state), strict=True)
    assert steps_of(model) == {5}
    assert simulators(model)["fc.weight"].sparsity == RAMP.compute_sparsity(5, 0.5)
    assert len(caplog.messages) == 1
    assert "has no step_count" in caplog.text
    assert "goes on from step 5" in caplog.text
    pruner.step()
    model.load_state_dict(dict(state))
    assert steps_of(model) == {6}
    caplog.clear()
    model.load_state_dict(model.state_dict())
    assert not caplog.messages


class TestPrepareWithAState:
    def saved(self, x, steps=3):
        torch.manual_seed(5)
        model = Net().eval()
        pruner = MagnitudePruner(model, everywhere(PruningSpec(target_sparsity=0.8), RAMP))
        pruner.prepare((x,))
        train(model, pruner, x, steps)
        return model, model.state_dict()

    def fresh(self):
        torch.manual_seed(6)
        model = Net().eval()
        return model, MagnitudePruner(model, everywhere(PruningSpec(target_sparsity=0.8), RAMP))

    def test_no_mask_is_computed_and_the_model_runs_once(self, x, monkeypatch):
        trained, state = self.saved(x)
        model, pruner = self.fresh()
        weight = model.fc.weight
        forwards = []
        model.register_forward_pre_hook(lambda *_: forwards.append(1))
        monkeypatch.setattr(PruneImplBase, "mask_for", None)
        pruner.prepare((torch.zeros_like(x),), state_dict=state)
        assert len(forwards) == 1
        assert torch.equal(model(x), trained(x))
        assert model.fc.parametrizations.weight.original is weight
        assert pruner._step_count == 3

    BROKEN: ClassVar = {
        "another key": lambda state: state | {"nothing": torch.zeros(1)},
        "a missing key": lambda state: {k: v for k, v in state.items() if k != "fc.bias"},
        "a float model": lambda state: Net().state_dict(),
        "another shape": lambda state: state | {"fc.bias": torch.zeros(3)},
        "different steps": lambda state: state | {"fc.parametrizations.weight.0.step_count": torch.tensor(9)},
        "no mask": lambda state: state | {"fc.parametrizations.weight.0.mask": torch.empty(0)},
    }

    @pytest.mark.parametrize("kind", BROKEN)
    def test_what_does_not_fit_leaves_the_model_as_it_was(self, x, kind):
        _, state = self.saved(x)
        model, pruner = self.fresh()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        objects = dict(model.named_parameters())
        match = (
            r"no compression state for fc\.parametrizations\.weight\.0"
            if kind == "no mask"
            else "does not fit"
        )
        with pytest.raises(RuntimeError, match=match):
            pruner.prepare((x,), state_dict=self.BROKEN[kind](dict(state)))
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(value is objects[name] for name, value in model.named_parameters())
        assert not model._load_state_dict_post_hooks
        pruner.prepare((x,), state_dict=state)
        assert pruner._step_count == 3

    def test_it_is_given_by_keyword(self, x):
        with pytest.raises(TypeError, match="positional"):
            self.fresh()[1].prepare((x,), {})
        with pytest.raises(TypeError):
            self.fresh()[1].prepare((x,), state_dict=3)
