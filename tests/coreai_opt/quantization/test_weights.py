"""Simulated weights as parts of a model: each read is a simulation of its own, of the weight as it is now."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from coreai_kernels.runtime import fast_path_counts, is_enabled
from coreai_opt.quantization import QuantizationSpec, QuantizerConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

from .support import WEIGHTS_ONLY, Mlp, Outer, globally, prepared

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def weights_only(model: nn.Module) -> nn.Module:
    return prepared(model, X, config=globally(**WEIGHTS_ONLY))[1]


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.actor, self.critic = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(x), self.critic(x)


def original(module: nn.Module) -> nn.Parameter:
    return module.parametrizations.weight.original


def simulated(module: nn.Module) -> Tensor:
    return module.parametrizations.weight[0](original(module))


def test_two_losses_are_backpropagated_one_after_the_other() -> None:
    model = weights_only(ActorCritic())
    actor, critic = model(X)
    actor.sum().backward()
    critic.sum().backward()
    assert original(model.actor).grad is not None
    assert original(model.critic).grad is not None


def test_a_partial_gradient_leaves_the_rest_of_the_graph() -> None:
    model = weights_only(ActorCritic())
    actor, critic = model(X)
    torch.autograd.grad(actor.sum(), original(model.actor))
    critic.sum().backward()


def test_a_module_called_twice_has_two_graphs() -> None:
    model = weights_only(ActorCritic())
    one, other = model.trunk(X), model.trunk(2 * X)
    one.sum().backward()
    other.sum().backward()


def test_hooks_of_weights_that_get_no_gradient_are_not_called() -> None:
    model = weights_only(ActorCritic())
    heard: list[object] = []
    original(model.critic).register_hook(lambda grad: heard.append(grad))
    original(model.critic).register_post_accumulate_grad_hook(lambda parameter: heard.append(parameter))
    original(model.actor).register_hook(lambda grad: grad.clamp(-1, 1))
    model(X)[0].sum().backward()
    assert heard == []
    assert original(model.critic).grad is None


def test_gradients_accumulate_over_forwards() -> None:
    model = weights_only(Mlp())
    for _ in range(2):
        model(X).sum().backward()
    twice = original(model.first).grad.clone()
    model.zero_grad()
    (model(X).sum() + model(X).sum()).backward()
    assert torch.equal(original(model.first).grad, twice)


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


@pytest.fixture(params=["no_grad", "inference_mode", "frozen", "training"])
def run(request):
    def run(model: nn.Module, x: Tensor) -> Tensor:
        if request.param == "training":
            return model(x)
        if request.param == "frozen":
            return model.requires_grad_(False)(x)
        with getattr(torch, request.param)():
            return model(x)

    return run


def fused_step(optimizer):
    def step(model: nn.Module) -> None:
        with torch.enable_grad():
            weight = original(model.first)
            weight.grad = torch.ones_like(weight)
            optimizer([weight], lr=0.5, fused=True).step()
            weight.grad = None

    return step


def through_numpy(model: nn.Module) -> None:
    original(model.first).detach().numpy()[:] *= 2


CHANGES = {
    "in place": lambda model: original(model.first).detach().add_(0.1),
    ".data": lambda model: original(model.first).data.mul_(2),
    ".data replaced": lambda model: setattr(original(model.first), "data", torch.ones(16, 8)),
    "vector_to_parameters": lambda model: vector_to_parameters(
        parameters_to_vector(model.parameters()).detach() * 2, model.parameters()
    ),
    "numpy": through_numpy,
    "dlpack": lambda model: torch.from_dlpack(original(model.first).detach()).mul_(2),
    "fused SGD": fused_step(torch.optim.SGD),
    "fused Adam": fused_step(torch.optim.Adam),
    "fused AdamW": fused_step(torch.optim.AdamW),
    "fused Adagrad": fused_step(torch.optim.Adagrad),
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
}


def simulator(model: nn.Module):
    return model.first.parametrizations.weight[0]


@pytest.mark.parametrize("change", CHANGES)
def test_reads_follow_changes(change, run) -> None:
    model = weights_only(Mlp()).eval()
    for _ in range(3):
        run(model, X)
    before = run(model, X).clone()
    with torch.no_grad():
        CHANGES[change](model)
        fresh = copy.deepcopy(model)
        wanted = fresh(X)
    found = run(model, X)
    assert torch.equal(found, wanted)
    assert change in ("output", "observing", "setting") or not torch.equal(found, before)


def test_a_write_into_a_simulated_weight_reaches_no_other_reader() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 8, max_norm=0.5)
            self.head = nn.Linear(8, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.embedding(index))

    index = torch.arange(6)
    torch.manual_seed(0)
    model = prepared(Tied(), index, config=globally(**WEIGHTS_ONLY))[1]
    with torch.no_grad():
        weight = simulated(model.embedding)
        embedded = F.embedding(index, weight.clone(), max_norm=0.5)
        assert torch.equal(model(index), F.linear(embedded, simulated(model.head)))


def test_nothing_of_the_weights_size_is_held_between_forwards() -> None:
    model = weights_only(nn.Sequential(nn.Linear(8, 2000)))
    with torch.no_grad():
        model(X)
        weight = model[0].weight
        assert weight._use_count() == 1


def test_moving_averages_observe_at_each_read() -> None:
    spec = QuantizationSpec(qparam_calculator_cls="moving_average")
    _, model = prepared(Mlp(), X, config=globally(**WEIGHTS_ONLY, op_state_spec={"weight": spec}))
    average = simulator(model).qparams_calculator
    simulator(model).enable_observer()
    with torch.no_grad():
        original(model.first).mul_(2)
        seen = [average.running_max.clone() for _ in range(3) if model(X) is not None]
    assert seen[0] < seen[1] < seen[2]


def test_a_copy_is_independent() -> None:
    model = weights_only(Mlp())
    before = model(X)
    other = copy.deepcopy(model)
    with torch.no_grad():
        original(other.first).zero_()
    assert torch.equal(model(X), before)
    assert not torch.equal(other(X), before)
    other(X).sum().backward()
    assert original(model.first).grad is None


def test_weights_in_bfloat16() -> None:
    _, model = prepared(
        Mlp().bfloat16(), X.bfloat16(), config=QuantizerConfig.presets.w4(execution_mode="eager")
    )
    assert model(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.skipif(not is_enabled(), reason="no fast path in this installation")
def test_weights_of_intercepted_modules_take_the_fast_path() -> None:
    model = prepared(Outer(), X)[1].train()
    for _ in range(4):
        model(X).sum().backward()
    before = fast_path_counts()
    model(X)
    after = fast_path_counts()
    simulators = sum(isinstance(module, FakeQuantizeImplBase) for module in model.modules())
    assert after["misses"] == before["misses"]
    assert after["hits"] - before["hits"] >= simulators
