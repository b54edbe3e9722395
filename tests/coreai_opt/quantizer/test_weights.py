"""Weights that are simulated together, held, or neither: the results never differ."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coreai_kernels.ops import foreach
from coreai_opt.quantization import QuantizationSpec, QuantizerConfig

from .support import WEIGHTS_ONLY, Mlp, Outer, globally, prepared

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def weights_only(model: nn.Module) -> nn.Module:
    return prepared(model, X, config=globally(**WEIGHTS_ONLY))[1]


def simulated_singly(model: nn.Module, x: Tensor) -> Tensor:
    """The output with the weights' simulators called one by one on the originals."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        module.__dict__.pop("forward", None)
    return reference(x)


def test_training_simulates_together(monkeypatch) -> None:
    model = weights_only(Mlp()).train()
    launched = []
    given = foreach.Launch.__call__
    monkeypatch.setattr(
        foreach.Launch, "__call__", lambda self, inputs: launched.append(len(inputs)) or given(self, inputs)
    )
    for count in range(1, 4):
        out = model(X)
        assert launched == [2] * count
        torch.testing.assert_close(out, simulated_singly(model, X), rtol=0, atol=0)


def test_gradients_are_those_of_single_simulators() -> None:
    model = weights_only(Outer())
    single = copy.deepcopy(model)
    for module in single.modules():
        module.__dict__.pop("forward", None)
    for each in (model, single):
        each(X).square().sum().backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), single.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_weight_that_was_not_read_has_no_gradient() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, both: bool = True) -> Tensor:
            return self.left(x) + self.right(x) if both else self.left(x)

    model = weights_only(Branches())
    model(X, False).sum().backward()
    assert model.left.parametrizations.weight.original.grad is not None
    assert model.right.parametrizations.weight.original.grad is None


def test_gradients_accumulate_over_forwards() -> None:
    model = weights_only(Mlp())
    for _ in range(2):
        model(X).sum().backward()
    twice = model.first.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    (model(X).sum() + model(X).sum()).backward()
    assert torch.equal(model.first.parametrizations.weight.original.grad, twice)


def test_a_part_called_alone_after_a_step_has_its_own_graph() -> None:
    model = weights_only(Mlp())
    model(X).sum().backward()
    model.first(X).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant) -> None:
    class Checkpointed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=reentrant).relu())

    torch.manual_seed(0)
    plain = weights_only(Mlp())
    model = weights_only(Checkpointed())
    model.load_state_dict(plain.state_dict())
    for each in (plain, model):
        each(X.clone().requires_grad_()).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.fixture(params=["no_grad", "inference_mode", "frozen"])
def without_gradient(request):
    def run(model: nn.Module, x: Tensor) -> Tensor:
        if request.param == "frozen":
            return model.requires_grad_(False)(x)
        with getattr(torch, request.param)():
            return model(x)

    return run


def test_unchanged_weights_are_held(without_gradient) -> None:
    model = weights_only(Mlp()).eval()
    without_gradient(model, X)
    with torch.no_grad(), torch.inference_mode(torch.is_inference_mode_enabled()):
        held = model.first.parametrizations.weight.__dict__["forward"]._held
    out = without_gradient(model, X)
    assert model.first.parametrizations.weight.__dict__["forward"]._held is held
    assert held is not None
    assert torch.equal(out, simulated_singly(model, X))


CHANGES = {
    "optimizer": lambda model: model.first.parametrizations.weight.original.detach().add_(0.1),
    "scale": lambda model: simulator(model).qparams_calculator.scale.mul_(2),
    "switched off": lambda model: simulator(model).disable_fake_quant(),
    "observing": lambda model: simulator(model).enable_observer(),
    "setting": lambda model: setattr(simulator(model), "quant_max", 7),
    "loaded": lambda model: model.load_state_dict(
        {name: each * 2 if each.is_floating_point() else each for name, each in model.state_dict().items()}
    ),
    "parameter": lambda model: setattr(
        model.first.parametrizations.weight, "original", nn.Parameter(torch.ones(16, 8))
    ),
    "output": lambda model: model.first.weight.mul_(2),
    "data and eval()": lambda model: (
        model.first.parametrizations.weight.original.data.add_(0.1) is model.eval()
    ),
}


def simulator(model: nn.Module):
    return model.first.parametrizations.weight[0]


@pytest.mark.parametrize("change", CHANGES)
def test_held_weights_follow_changes(change, without_gradient) -> None:
    model = weights_only(Mlp()).eval()
    without_gradient(model, X)
    with torch.no_grad():
        CHANGES[change](model)
    assert torch.equal(without_gradient(model, X), simulated_singly(model, X))


def test_held_weights_are_let_go_of_in_training() -> None:
    model = weights_only(Mlp())
    with torch.no_grad():
        model(X)
    model(X)
    assert model.first.parametrizations.weight.__dict__["forward"]._held is None


def test_moving_averages_observe_at_each_read() -> None:
    spec = QuantizationSpec(qparam_calculator_cls="moving_average")
    _, model = prepared(Mlp(), X, config=globally(**WEIGHTS_ONLY, op_state_spec={"weight": spec}))
    average = model.first.parametrizations.weight[0].qparams_calculator
    model.first.parametrizations.weight[0].enable_observer()
    with torch.no_grad():
        model.first.parametrizations.weight.original.mul_(2)
        seen = [average.running_max.clone() for _ in range(3) if model(X) is not None]
    assert seen[0] < seen[1] < seen[2]


def test_a_copy_is_independent() -> None:
    model = weights_only(Mlp())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.first.parametrizations.weight.original.zero_()
    assert torch.equal(model(X), simulated_singly(model, X))
    assert torch.equal(other(X), simulated_singly(other, X))
    other(X).sum().backward()
    assert model.first.parametrizations.weight.original.grad is None


def test_weights_in_bfloat16() -> None:
    _, model = prepared(
        Mlp().bfloat16(), X.bfloat16(), config=QuantizerConfig.presets.w4(execution_mode="eager")
    )
    assert model(X.bfloat16()).dtype == torch.bfloat16
