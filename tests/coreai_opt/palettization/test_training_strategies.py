"""What palettized weights do in training: their gradients, and how palettes follow."""

from typing import ClassVar

import pytest
import torch

from coreai_opt.palettization.spec import (
    DKMTrainingSpec,
    PalettizationSpec,
    PerGroupedChannelGranularity,
    StraightThroughTrainingSpec,
    TrainingStrategy,
    TrainingStrategySpec,
)
from coreai_opt.quantization.spec import QuantizationSpec

GROUPS = PerGroupedChannelGranularity(axis=0, group_size=8)
STRATEGIES = {
    "default": {"type": "default"},
    "straight_through": {"type": "straight_through"},
    "dkm": {"type": "dkm"},
    "dkm, iterated": {"type": "dkm", "iterations": 2},
}
SPECS = {
    "scalars": {"n_bits": 2},
    "groups, scaled": {"n_bits": 2, "granularity": GROUPS, "enable_per_channel_scale": True},
    "vectors": {"n_bits": 2, "cluster_dim": 2},
    "quantized": {"n_bits": 3, "lut_qspec": QuantizationSpec()},
}


@pytest.fixture
def gradient(weight):
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def test_default_weights_stay(simulator, weight):
    module = simulator(n_bits=2)
    assert not module(weight.requires_grad_()).requires_grad
    assert not list(module.parameters())


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_straight_through(simulator, weight, gradient, fields):
    module = simulator(**fields, training_strategy_spec=StraightThroughTrainingSpec())
    values = module(weight.requires_grad_())
    values.backward(gradient)
    assert torch.allclose(weight.grad, gradient, atol=1e-6)
    assert not list(module.parameters())
    default = simulator(**fields)
    if fields.get("lut_qspec") is None:
        assert torch.equal(values, default(weight.detach()))


def test_straight_through_assigns_in_every_forward(simulator, weight):
    module = simulator(n_bits=1, training_strategy_spec=StraightThroughTrainingSpec())
    values = module(weight)
    low, high = module.centroids.flatten().tolist()
    assert torch.equal(module(-weight), torch.where(-weight - low < high + weight, low, high))
    assert torch.equal(module(weight), values)


def test_refreshed_palettes_follow_the_weight(simulator, weight):
    module = simulator(n_bits=2, training_strategy_spec=StraightThroughTrainingSpec(refresh_iterations=30))
    module(weight)
    module.step(2 * weight + 1, 1)
    exact = simulator(n_bits=2)
    exact(2 * weight + 1)
    error = (module(2 * weight + 1) - 2 * weight - 1).square().sum()
    assert error <= 1.05 * (exact(2 * weight + 1) - 2 * weight - 1).square().sum()


def test_a_refresh_is_the_mean_of_each_cluster(simulator):
    weight = torch.tensor([[0.0, 1.0, 10.0, 11.0]])
    module = simulator(n_bits=1, training_strategy_spec=StraightThroughTrainingSpec())
    module(weight)
    module.step(torch.tensor([[1.0, 3.0, 30.0, 50.0]]), 1)
    assert module.centroids.flatten().tolist() == [2.0, 40.0]
    # An entry without values stays.
    module.step(torch.tensor([[41.0, 41.0, 41.0, 41.0]]), 2)
    assert module.centroids.flatten().tolist() == [2.0, 41.0]


def test_refresh_weighs_by_sensitivities(simulator):
    weight = torch.tensor([[0.0, 1.0, 10.0, 11.0]])
    sensitivities = torch.tensor([[1.0, 3.0, 0.0, 0.0]])
    strategy = StraightThroughTrainingSpec()
    module = simulator(n_bits=1, sensitivities=sensitivities, training_strategy_spec=strategy)
    module(weight)
    module.set_palettes(torch.tensor([[[0.5], [10.5]]]))
    module.step(weight, 1)
    assert module.centroids.flatten().tolist() == [0.75, 10.5]


def test_refresh_interval(simulator, weight):
    module = simulator(n_bits=2, training_strategy_spec=StraightThroughTrainingSpec(refresh_interval=3))
    module(weight)
    before = module.centroids.clone()
    for step in (1, 2):
        module.step(2 * weight, step)
        assert torch.equal(module.centroids, before)
    module.step(2 * weight, 3)
    assert not torch.equal(module.centroids, before)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("iterations", [0, 2])
def test_dkm_is_differentiable_k_means(simulator, weight, gradient, fields, iterations):
    spec = DKMTrainingSpec(temperature=0.3, iterations=iterations)
    module = simulator(**fields, training_strategy_spec=spec)
    module(weight)
    weight.requires_grad_()
    values = module(weight)
    values.backward(gradient)
    found = weight.grad.clone(), module.centroids.grad.clone()
    weight.grad = module.centroids.grad = None
    blocks, palettes = module.blocks(weight), module.palettes()
    vectors = blocks.vectors(module.scaled(weight))
    for _ in range(iterations + 1):
        distances = (vectors.unsqueeze(2) - palettes.unsqueeze(1)).square().sum(-1)
        attention = torch.softmax(-distances / (0.3 * module.palette_spacing), dim=2)
        mixed = attention @ palettes
        palettes = attention.transpose(1, 2) @ vectors / attention.sum(1).unsqueeze(2)
    expected = module.unscale(blocks.weight(mixed))
    assert torch.allclose(values, expected, atol=1e-5)
    expected.backward(gradient)
    assert torch.allclose(found[0], weight.grad, atol=1e-4)
    assert torch.allclose(found[1], module.centroids.grad, rtol=1e-3, atol=1e-4)


def test_dkm_trains_the_palette(simulator, weight):
    module = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
    module(weight)
    assert [name for name, _ in module.named_parameters()] == ["centroids"]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    best = (module.eval()(weight) - weight).square().sum().item()
    with torch.no_grad():
        module.train().centroids.mul_(1.5)
    start = (module.eval()(weight) - weight).square().sum().item()
    module.train()
    losses = []
    for _ in range(40):
        loss = (module(weight) - weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module.eval()
    assert losses[-1] < losses[0]
    assert (module(weight) - weight).square().sum() < 0.5 * (start + best)
    assert set(module(weight).unique().tolist()) <= set(module.centroids.flatten().tolist())


def test_temperature_is_relative_to_the_spacing(simulator, weight):
    for scale in (1e-3, 1e3):
        small = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
        large = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
        assert torch.allclose(large(weight * scale), small(weight) * scale, rtol=1e-4, atol=1e-4 * scale)
    constant = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
    assert torch.equal(constant(torch.ones(4, 4)), torch.ones(4, 4))


def test_dkm_state_is_that_of_the_other_strategies(simulator, weight):
    dkm, default = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec()), simulator(n_bits=2)
    dkm(weight)
    default.load_state_dict(dkm.state_dict())
    assert torch.equal(default(weight), dkm.eval()(weight))
    fresh = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
    fresh.load_state_dict(default.state_dict())
    assert isinstance(fresh.centroids, torch.nn.Parameter)
    assert torch.equal(fresh.train()(weight), dkm.train()(weight))


def test_reinitializing_keeps_the_parameter(simulator, weight):
    module = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
    module(weight)
    parameter = module.centroids
    module.enable_fake_palett(reinitialize=True)
    module(3 * weight)
    assert module.centroids is parameter
    assert parameter.max() > 3


@pytest.mark.parametrize("strategy", ["straight_through", "dkm"])
def test_evaluation_assigns_anew_after_training(simulator, weight, strategy):
    module = simulator(n_bits=2, training_strategy_spec=STRATEGIES[strategy])
    module(weight)
    moved = weight.roll(1)
    module(moved)
    module.eval()
    values = module(moved)
    assert torch.equal(values, simulator(n_bits=2)(weight).roll(1))
    assert torch.equal(module(weight), values)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_training_compiles(simulator, weight, gradient, fields, strategy):
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        module = simulator(**fields, training_strategy_spec=strategy)
        module(weight)
        forward = torch.compile(module, fullgraph=True, backend="aot_eager") if compiles else module
        trained = weight.clone().requires_grad_()
        for step in (1, 2):
            values = forward(trained)
            if values.requires_grad:
                values.backward(gradient)
            module.step(trained, step)
        results.append((values, trained.grad, module.centroids.grad))
    for eager, compiled in zip(*results, strict=True):
        assert (eager is None) == (compiled is None)
        assert eager is None or torch.equal(eager, compiled)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_nothing_is_read_on_the_host(simulator, weight, gradient, fields, strategy, host_reads):
    module = simulator(**fields, training_strategy_spec=strategy)
    module(weight)
    weight.requires_grad_()
    with host_reads:
        for step in (1, 2):
            values = module(weight)
            if values.requires_grad:
                values.backward(gradient)
            module.step(weight, step)
    assert not host_reads.seen


def test_dkm_goes_on_from_a_checkpoint(simulator, weight):
    module = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
    module(weight)
    with torch.no_grad():
        module.centroids.copy_(module.centroids * 1.5)  # as training does, entry by entry
    state = module.state_dict()
    resumed = simulator(n_bits=2, training_strategy_spec=DKMTrainingSpec())
    resumed.load_state_dict(state)
    assert torch.equal(resumed(weight), module(weight))
    # Others do without; and what has no spacing takes that of its palette.
    default = simulator(n_bits=2)
    default.load_state_dict(state)
    assert "palette_spacing" not in default.state_dict()
    resumed.load_state_dict(default.state_dict())
    assert resumed.palette_spacing == pytest.approx(1.5**2 * module.palette_spacing)


class Halve(TrainingStrategy):
    def __init__(self, factor):
        self.factor = factor
        self.steps = []

    def train_forward(self, module, weight):
        return module.hard_assign(weight) * self.factor

    def on_step(self, module, weight, step):
        self.steps.append(step)


def test_a_strategy_of_ones_own(simulator, weight, registration):
    @registration(TrainingStrategySpec, "halve")
    class HalveSpec(TrainingStrategySpec):
        _strategy_cls: ClassVar[type[TrainingStrategy]] = Halve

        factor: float = 0.5

    spec = PalettizationSpec(n_bits=2, training_strategy_spec={"type": "halve", "factor": 0.25})
    assert PalettizationSpec(**spec.model_dump()) == spec
    assert isinstance(spec.training_strategy_spec, HalveSpec)
    module = simulator(n_bits=2, training_strategy_spec=spec.training_strategy_spec)
    values = module(weight)
    assert torch.equal(values, simulator(n_bits=2)(weight) * 0.25)
    module.step(weight, 7)
    assert module._training_strategy.steps == [7]
    assert torch.equal(module.eval()(weight) * 0.25, values)
