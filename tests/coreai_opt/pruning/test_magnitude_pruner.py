"""The pruner: which weights it finds, what it leaves as it was, and what it refuses."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from pruned_models import TORCH, Net, entry, everywhere, simulators, sparsities, zeros
from torch import nn

from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.config import PolynomialDecaySchedule
from coreai_opt.pruning.spec import ChannelStructured, PruneImplBase
from coreai_opt.quantization import QuantizationSpec


def test_prepare_masks_half_of_each_weight(model, x):
    assert MagnitudePruner(model).prepare((x,)) is model
    assert sparsities(model) == {"conv.weight": 0.5, "fc.weight": 0.5, "head.weight": 0.5}
    for name, simulator in simulators(model).items():
        assert simulator.tensor_fqn == name
        assert not simulator.is_stale
    assert list(model.state_dict())[:3] == [
        "conv.bias",
        "conv.parametrizations.weight.original",
        "conv.parametrizations.weight.0.mask",
    ]
    assert zeros(model.fc.weight) == 128


def test_prepare_leaves_no_other_trace(model, x):
    before = copy.deepcopy(model.state_dict())
    model.drop.eval()
    generator_state = torch.get_rng_state()
    MagnitudePruner(model).prepare((x,))
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    for name, value in model.norm.state_dict(prefix="norm.").items():
        assert torch.equal(value, before[name])
    assert torch.equal(model.fc.parametrizations.weight.original, before["fc.weight"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Stateful(nn.Module):
    """Changes a buffer in place, replaces another, and has one that cannot be written."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("scale", torch.ones(1).expand(4))

    def forward(self, x):
        self.count += 1
        self.last = x.mean()
        return self.fc(x * self.scale)


def test_prepare_restores_buffers():
    model = Stateful()
    before = dict(model.named_buffers())
    MagnitudePruner(model).prepare((torch.randn(2, 4),))
    assert all(getattr(model, name) is buffer for name, buffer in before.items())
    assert model.count.eq(0).all()
    assert model.last.shape == (3,)


def test_parameters_stay_the_same_objects(model, x):
    weight = model.fc.weight
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    assert model.fc.parametrizations.weight.original is weight
    pruner.finalize(backend=TORCH)
    assert model.fc.weight is weight


THREE_QUARTERS = {"weight": {"target_sparsity": 0.75}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"global_config": None}, {}),
        ({"module_name_configs": {"fc": None}}, {"conv.weight": 0.5, "head.weight": 0.5}),
        ({"module_type_configs": {nn.Linear: None}}, {"conv.weight": 0.5}),
        (
            {"global_config": None, "module_name_configs": {"head": entry(0.25, ("*",))}},
            {"head.weight": 0.25, "head.bias": 0.25},
        ),
        (
            {
                "global_config": entry(
                    op_type_config={"linear": {"op_state_spec": {"weight": {"target_sparsity": 0.75}}}}
                )
            },
            {"conv.weight": 0.5, "fc.weight": 0.75, "head.weight": 0.75},
        ),
        (
            {
                "global_config": entry(
                    op_type_config={"linear": None},
                    op_name_config={r"h.*\.linear": {"op_state_spec": THREE_QUARTERS}},
                )
            },
            {"conv.weight": 0.5, "head.weight": 0.75},
        ),
        (
            {
                "global_config": None,
                "module_type_configs": {
                    nn.BatchNorm2d: entry(
                        0.5, module_state_spec={"weight": PruningSpec(target_sparsity=0.125)}
                    )
                },
            },
            {"norm.weight": 0.125},
        ),
    ],
)
def test_which_tensors_are_pruned(model, x, fields, expected):
    MagnitudePruner(model, MagnitudePrunerConfig(**fields)).prepare((x,))
    assert sparsities(model) == expected


class Functional(nn.Module):
    """Weights that functions read: shared ones, unused ones, one of a list, one with a single element."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.others = nn.ParameterList([nn.Parameter(torch.randn(8, 8))])
        self.unused = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.single = nn.Conv1d(1, 1, 1)
        self.counts = nn.Embedding(3, 8)

    def forward(self, x):
        x = F.linear(F.linear(x, self.weight), self.others[0])
        x = x + self.counts(torch.zeros(len(x), dtype=torch.long))
        return self.single(self.second(self.first(x)).unsqueeze(1))


def test_weights_of_functions(caplog):
    model = Functional()
    config = MagnitudePrunerConfig(
        global_config=entry(0.5, ("*",)), module_name_configs={"first|second": entry()}
    )
    with caplog.at_level("WARNING", logger="coreai_opt"):
        MagnitudePruner(model, config).prepare((torch.randn(4, 8),))
    assert set(sparsities(model)) == {".weight", "others.0", "first.weight", "second.weight"}
    assert (
        "single.weight has a specification, but is no floating-point tensor of several elements"
        in caplog.text
    )


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_a_shared_weight_has_one_mask(order):
    model, x = Functional(), torch.randn(4, 8)
    config = MagnitudePrunerConfig(
        global_config=None,
        module_name_configs={name: entry(level) for name, level in zip(order, (0.25, 0.75), strict=True)},
    )
    pruner = MagnitudePruner(model, config)
    pruner.prepare((x,))
    masks = simulators(model)
    assert masks["first.weight"] is masks["second.weight"]
    # Both are configured: the one that runs last decides.
    assert masks["first.weight"].sparsity == (0.75 if order[1] == "second" else 0.25)
    weight = model.first.parametrizations.weight.original
    assert model.second.parametrizations.weight.original is weight
    pruner.finalize(backend=TORCH)
    assert model.first.weight is model.second.weight is weight
    assert zeros(weight) == 64 * (0.75 if order[1] == "second" else 0.25)


@pytest.mark.parametrize("training", [True, False])
def test_attention(training):
    model = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    pruner = MagnitudePruner(model)
    pruner.prepare((x, x, x))
    assert sparsities(model) == {".in_proj_weight": 0.5, "out_proj.weight": 0.5}
    expected = model(x, x, x)[0]
    pruner.finalize(backend=TORCH)
    assert zeros(model.in_proj_weight) == 96
    assert torch.allclose(model(x, x, x)[0], expected, atol=1e-6)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model, x = Net(), torch.empty(2, 1, 4, 4)
    MagnitudePruner(model).prepare((x,))
    assert simulators(model)["fc.weight"].mask.shape == (8, 32)
    assert model.fc.weight.is_meta


def test_supported_modules():
    assert nn.Linear in MagnitudePruner.supported_modules()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "model must be an nn.Module, got NoneType"),
        ((Net,), "model must be an nn.Module, got type"),
        ((Net(), {}), "config must be a MagnitudePrunerConfig, got dict"),
        ((Net(), QuantizationSpec()), "config must be a MagnitudePrunerConfig, got QuantizationSpec"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        MagnitudePruner(*arguments)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (None, TypeError, "example_inputs must be a tuple.*got NoneType"),
        (torch.zeros(1, 1, 4, 4), TypeError, "example_inputs must be a tuple.*got Tensor"),
        ((), TypeError, "missing 1 required positional argument"),
        ((torch.zeros(3),), RuntimeError, "conv2d"),
        ((torch.zeros(1, 1, 4, 4, device="meta"),), (RuntimeError, NotImplementedError), "meta"),
    ],
)
def test_wrong_example_inputs_leave_the_model_as_it_was(model, x, inputs, error, message):
    before = copy.deepcopy(model.state_dict())
    pruner = MagnitudePruner(model)
    with pytest.raises(error, match=message):
        pruner.prepare(inputs)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    pruner.prepare((x,))


def test_a_scheme_that_does_not_fit_leaves_the_model_as_it_was(model, x):
    spec = PruningSpec(pruning_scheme=ChannelStructured(axis=2))
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\)"):
        MagnitudePruner(model, everywhere(spec)).prepare((x,))
    assert not simulators(model)


def test_the_order_of_calls(model, x):
    pruner = MagnitudePruner(model)
    with pytest.raises(RuntimeError, match=r"finalize: the model is not prepared. Call prepare"):
        pruner.finalize(backend=TORCH)
    with pytest.raises(RuntimeError, match="step: the model is not prepared"):
        pruner.step()
    pruner.prepare((x,))
    for again in (pruner, MagnitudePruner(model)):
        with pytest.raises(RuntimeError, match="prepared already"):
            again.prepare((x,))
    with pytest.raises(RuntimeError, match="not prepared"):
        pruner.finalize(nn.Linear(2, 2), backend=TORCH)
    with pytest.raises(NotImplementedError, match="no calibration data"):
        pruner.calibration_mode()
    with pytest.raises(NotImplementedError, match="no training mode"):
        pruner.training_mode()
    pruner.finalize(backend=TORCH)
    with pytest.raises(RuntimeError, match="step: the model is not prepared"):
        pruner.step()
    with pytest.raises(RuntimeError, match="finalize: the model is not prepared"):
        pruner.finalize(backend=TORCH)
    pruner.prepare((x,))
    pruner.step()


@pytest.mark.parametrize("backend", ["onnx", None, 3])
def test_backends_that_do_not_exist(model, x, backend):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    with pytest.raises(ValueError, match="backend must be one of torch, coreml, coreai; got"):
        pruner.finalize(backend=backend)


def test_a_custom_algorithm(registration, model, x):
    @registration(PruneImplBase, "random")
    class Random(PruneImplBase):
        @staticmethod
        def compute_mask(weight, sparsity, pruning_scheme):
            generator = torch.Generator().manual_seed(0)
            return torch.rand(weight.shape, generator=generator) >= sparsity

    pruner = MagnitudePruner(model, everywhere(PruningSpec(pruning_algo="random"), global_threshold=True))
    pruner.prepare((x,))
    pruner.finalize(backend=TORCH)
    assert 0.3 < zeros(model.fc.weight) / 256 < 0.7


@pytest.mark.parametrize("kept", ["one tensor for all", "the weight"])
def test_masks_have_memory_of_their_own(registration, kept):
    known = {}

    @registration(PruneImplBase, "kept")
    class Kept(PruneImplBase):
        @staticmethod
        def compute_mask(weight, sparsity, pruning_scheme):
            return weight if kept == "the weight" else known.setdefault(weight.shape, (weight > 0).float())

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    MagnitudePruner(model, everywhere(PruningSpec(pruning_algo="kept"))).prepare((torch.ones(2, 8),))
    masks = [layer.parametrizations.weight[0].mask for layer in model]
    before = [masks[1].clone(), model[0].parametrizations.weight.original.clone()]
    masks[0].zero_()
    assert torch.equal(masks[1], before[0])
    assert torch.equal(model[0].parametrizations.weight.original, before[1])


@pytest.mark.parametrize("on", ["subclass", "instance", "class"])
def test_who_overrides_update_sparsity_decides(registration, model, x, on, monkeypatch):
    default = PruneImplBase.get_class("default")
    given = PruneImplBase.update_sparsity

    def every_other_step(self, step_count):
        given(self, step_count // 2 * 2)

    registration(PruneImplBase, "slow")(type("Slow", (default,), {"update_sparsity": every_other_step}))
    spec = PruningSpec(target_sparsity=0.75, pruning_algo="slow" if on == "subclass" else "default")
    schedule = PolynomialDecaySchedule(total_iters=6)
    pruner = MagnitudePruner(model, everywhere(spec, schedule))
    pruner.prepare((x,))
    for simulator in simulators(model).values():
        if on == "instance":
            simulator.update_sparsity = functools.partial(every_other_step, simulator)
    if on == "class":
        monkeypatch.setattr(PruneImplBase, "update_sparsity", every_other_step)
    found = []
    for _ in range(6):
        pruner.step()
        found.append(simulators(model)["fc.weight"].sparsity)
    wanted = [schedule.compute_sparsity(step // 2 * 2, 0.75) for step in range(1, 7)]
    assert found == wanted
    assert simulators(model)["fc.weight"].mask.sum() == 256 - round(256 * wanted[-1])
