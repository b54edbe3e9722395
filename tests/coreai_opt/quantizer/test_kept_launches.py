"""Launches that are kept from forward to forward: whatever changes in between, the results are as without."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import remove_parametrizations

from coreai_kernels.ops import foreach
from coreai_opt.quantization._eager.together_forward import TogetherForward

from .support import WEIGHTS_ONLY, globally, prepared

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    return prepared(model, X, config=globally(**WEIGHTS_ONLY))[1].train()


def simulator_of(model: nn.Module, layer: int = 1) -> nn.Module:
    return model[layer].parametrizations.weight[0]


def original_of(model: nn.Module, layer: int = 1) -> nn.Parameter:
    return model[layer].parametrizations.weight.original


def step(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    out = model(X.to(original_of(model).dtype))
    out.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out, *gradients, *model.buffers()]


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """The sizes of the launches."""
    sizes: list[int] = []
    given = foreach.Launch.__call__
    monkeypatch.setattr(
        foreach.Launch, "__call__", lambda self, inputs: sizes.append(len(inputs)) or given(self, inputs)
    )
    return sizes


def _replace_scale(model: nn.Module) -> None:
    simulator_of(model).disable_observer()
    calculator = simulator_of(model).qparams_calculator
    calculator.scale = calculator.scale * 2


def _write_scale(model: nn.Module) -> None:
    simulator_of(model).disable_observer()
    simulator_of(model).qparams_calculator.scale.mul_(2)


def _replace_weight(model: nn.Module) -> None:
    model[1].parametrizations.weight.original = nn.Parameter(original_of(model).detach() * 3)


def _replace_data(model: nn.Module) -> None:
    original_of(model).data = original_of(model).detach().t().contiguous().t() * 3


def _write_weight(model: nn.Module) -> None:
    with torch.no_grad():
        original_of(model).mul_(3)


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)


def _assign_to(name: str, value: float):
    def change(model: nn.Module) -> None:
        for owner in (simulator_of(model), simulator_of(model).qparams_calculator):
            setattr(owner, name, value)

    return change


def _override(model: nn.Module) -> None:
    given = simulator_of(model).quantize
    simulator_of(model).quantize = lambda *args, **kwargs: given(*args, **kwargs)


def _replace_simulator(model: nn.Module) -> None:
    other = copy.deepcopy(simulator_of(model))
    for owner in (other, other.qparams_calculator):
        owner.quant_max = 3
    model[1].parametrizations.weight[0] = other


CHANGES = {
    "observer off": lambda model: simulator_of(model).disable_observer(),
    "all observers off": lambda model: [simulator_of(model, i).disable_observer() for i in range(3)],
    "simulation off": lambda model: simulator_of(model).disable_fake_quant(),
    "switch written": lambda model: simulator_of(model).fake_quant_enabled.fill_(0),
    "another switch": lambda model: setattr(
        simulator_of(model), "fake_quant_enabled", torch.zeros(1, dtype=torch.uint8)
    ),
    "scale replaced": _replace_scale,
    "scale written": _write_scale,
    "weight replaced": _replace_weight,
    "weight's data replaced": _replace_data,
    "weight written": _write_weight,
    "state loaded": _load,
    "simulator replaced": _replace_simulator,
    "parametrization removed": lambda model: remove_parametrizations(model[0], "weight"),
    "range": _assign_to("quant_max", 3),
    "method overridden": _override,
    "weight frozen": lambda model: original_of(model).requires_grad_(False),
    "dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_forwards_are_seen(name: str, launched: list[int]) -> None:
    ours = three_layers()
    for _ in range(3):
        step(ours)
    assert launched == [3, 3, 3]
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        module.__dict__.pop("forward", None)
    for model in (ours, theirs):
        CHANGES[name](model)
    for _ in range(3):
        for one, other in zip(step(ours), step(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_listeners_are_called_for_as_long_as_they_listen(launched: list[int]) -> None:
    model, heard = three_layers(), []
    for _ in range(2):
        step(model)
    own = simulator_of(model).register_forward_hook(lambda module, *_: heard.append(module))
    step(model)
    assert heard == [simulator_of(model)]
    own.remove()
    everywhere = register_module_forward_hook(lambda module, *_: heard.append(module))
    step(model)
    everywhere.remove()
    assert {simulator_of(model, i) for i in range(3)} <= set(heard)
    launched.clear()
    heard.clear()
    step(model)
    assert launched == [3]
    assert not heard


def test_launches_that_were_lost_come_back(launched: list[int]) -> None:
    model = three_layers()
    for simulator in (simulator_of(model, i) for i in range(3)):
        simulator.disable_fake_quant()
    for _ in range(3):
        step(model)
    assert launched == []
    for simulator in (simulator_of(model, i) for i in range(3)):
        simulator.enable_fake_quant()
    for _ in range(3):
        step(model)
    assert launched == [3, 3, 3]
    known = model.__dict__["forward"]._known
    step(model)
    assert model.__dict__["forward"]._known is known


def test_copies_keep_launches_of_their_own() -> None:
    model = three_layers()
    for _ in range(2):
        step(model)
    copied = copy.deepcopy(model)
    assert isinstance(copied.__dict__["forward"], TogetherForward)
    with torch.no_grad():
        original_of(copied).mul_(2)
    assert not torch.equal(step(copied)[0], step(model)[0])


@pytest.mark.parametrize("names", ["parameters", "buffers", "all"])
def test_calls_with_other_tensors_use_those(names: str) -> None:
    model = three_layers()
    for _ in range(2):
        step(model)
    given = {}
    if names != "buffers":
        given |= {name: (2 * value).detach() for name, value in model.named_parameters()}
    if names != "parameters":
        given |= {name: value.clone() for name, value in model.named_buffers()}
        given["1.parametrizations.weight.0.fake_quant_enabled"].zero_()
    given = {
        k: v.requires_grad_() if v.is_floating_point() and "original" in k else v for k, v in given.items()
    }
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict() | given, strict=False)  # a buffer is not in states
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(functional_call(model, given, (X,)), other(X))
    for name, value in model.state_dict().items():
        assert names == "parameters" or torch.equal(value, before[name]), name
    assert torch.equal(step(model)[0], step(copy.deepcopy(model))[0])
