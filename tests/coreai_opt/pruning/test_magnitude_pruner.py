"""The pruner: the weights that it finds, schedules, one threshold for all layers, resuming, finalizing."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt import ExportBackend
from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.config import ConstantSparsitySchedule, PolynomialDecaySchedule
from coreai_opt.pruning.spec import ChannelStructured, NMStructured, PruneImplBase
from coreai_opt.quantization import QuantizationSpec

TORCH = ExportBackend._TORCH
RAMP = PolynomialDecaySchedule(total_iters=9, update_frequency=2)


def entry(sparsity=0.5, names=("weight",), schedule=None, **fields):
    spec = {name: PruningSpec(target_sparsity=sparsity) for name in names}
    return ModuleMagnitudePrunerConfig(op_state_spec=spec, sparsity_schedule=schedule, **fields)


def everywhere(spec, schedule=None, **fields):
    module = ModuleMagnitudePrunerConfig(
        op_state_spec={"weight": spec, "in_proj_weight": spec}, sparsity_schedule=schedule
    )
    return MagnitudePrunerConfig(global_config=module, **fields)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(32, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.fc(self.drop(self.norm(self.conv(x))).flatten(1))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def simulators(model):
    return {
        f"{name}.{attribute}": chain[0]
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for attribute, chain in module.parametrizations.items()
    }


def sparsities(model):
    return {name: each.sparsity for name, each in simulators(model).items()}


def zeros(weight):
    return int((weight == 0).sum())


def train(model, pruner, x, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (model(x) - torch.randn(6, 4, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        losses.append(loss.item())
    return losses


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
    model.norm.eval()
    generator_state = torch.get_rng_state()
    MagnitudePruner(model).prepare((x,))
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert model.training
    assert not model.norm.training
    for name, value in model.norm.state_dict(prefix="norm.").items():
        assert torch.equal(value, before[name])
    assert torch.equal(model.fc.parametrizations.weight.original, before["fc.weight"])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


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


def test_masks_follow_the_schedule(model, x):
    pruner = MagnitudePruner(model, everywhere(PruningSpec(target_sparsity=0.75), RAMP))
    pruner.prepare((x,))
    assert set(sparsities(model).values()) == {0.0}
    previous, changes = 0.0, []
    for step in range(1, 12):
        train(model, pruner, x, 1)
        sparsity = RAMP.compute_sparsity(step, 0.75, previous)
        assert set(sparsities(model).values()) == {sparsity}
        assert zeros(model.fc.weight) == int(256 * sparsity)
        changes += [step] * (sparsity != previous)
        previous = sparsity
    assert changes == [2, 4, 6, 8]
    assert previous == 0.75


def test_a_mask_stays_while_the_weight_changes(model, x):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    mask = simulators(model)["fc.weight"].mask.clone()
    original = model.fc.parametrizations.weight.original.clone()
    train(model, pruner, x, 5)
    assert torch.equal(simulators(model)["fc.weight"].mask, mask)
    moved = model.fc.parametrizations.weight.original != original
    assert moved.any()
    assert not (moved & (mask == 0)).any()


def test_one_threshold_for_all_layers(model, x):
    with torch.no_grad():
        model.fc.weight.mul_(10)
    weights = {
        name: module.weight.detach().clone() for name, module in model.named_children() if name[0] in "cfh"
    }
    config = everywhere(
        PruningSpec(target_sparsity=0.6), ConstantSparsitySchedule(begin_step=1), global_threshold=True
    )
    pruner = MagnitudePruner(model, config)
    pruner.prepare((x,))
    pruner.step()
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    threshold = magnitudes.sort().values[int(len(magnitudes) * 0.6)]
    for name, weight in weights.items():
        assert torch.equal(simulators(model)[f"{name}.weight"].mask, (weight.abs() >= threshold).float())
    assert zeros(model.fc.weight) < 128 < zeros(model.conv.weight) + zeros(model.head.weight) + 64


def test_layers_of_their_own_in_a_global_ranking(model, x):
    config = everywhere(PruningSpec(target_sparsity=0.5), global_threshold=True)
    config.set_module_name("head", entry(0.25))
    config.set_module_name(
        "conv",
        ModuleMagnitudePrunerConfig(
            op_state_spec={"weight": PruningSpec(pruning_scheme=ChannelStructured())}
        ),
    )
    MagnitudePruner(model, config).prepare((x,))
    assert zeros(model.head.weight) == 8
    assert zeros(model.conv.weight) == 36
    assert zeros(model.fc.weight) == 128


def through_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("global_threshold", [False, True])
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("steps", [0, 3, 5, 12])
def test_training_goes_on_from_a_checkpoint_as_if_uninterrupted(x, global_threshold, metadata, steps):
    config = everywhere(PruningSpec(target_sparsity=0.8), RAMP, global_threshold=global_threshold)

    def prepared(seed):
        torch.manual_seed(seed)
        model = Net().eval()
        pruner = MagnitudePruner(model, config)
        pruner.prepare((x,))
        return model, pruner

    model, pruner = prepared(0)
    train(model, pruner, x, steps)
    checkpoint = through_save({"model": model.state_dict(), "pruner": pruner.state_dict()})

    resumed, other = prepared(1)
    if metadata:
        resumed.load_state_dict(checkpoint["model"])
    else:
        with pytest.warns(UserWarning, match="no step of the schedule"):
            resumed.load_state_dict(dict(checkpoint["model"]))
        other.load_state_dict(checkpoint["pruner"])
    assert train(model, pruner, x, 8, seed=9) == train(resumed, other, x, 8, seed=9)
    first, second = model.state_dict(), resumed.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert sparsities(model) == sparsities(resumed)


def test_a_checkpoint_of_another_model(model, x):
    pruner = MagnitudePruner(model, everywhere(PruningSpec(), RAMP))
    pruner.prepare((x,))
    pruner.step()
    state = pruner.state_dict()
    del state["step_count"]["fc.weight"]
    state["step_count"] = dict.fromkeys(state["step_count"], 7)
    with pytest.raises(KeyError, match=r"fc\.weight"):
        pruner.load_state_dict(state)
    assert {each.step_count for each in simulators(model).values()} == {1}


def test_finalize_leaves_plain_weights_with_zeros(model, x):
    pruner = MagnitudePruner(model, everywhere(PruningSpec(target_sparsity=0.75)))
    pruner.prepare((x,))
    train(model, pruner, x, 3)
    model.eval()
    expected = model(x)
    keys = list(Net().state_dict())
    assert pruner.finalize(backend=TORCH) is model
    assert sorted(model.state_dict()) == sorted(keys)
    assert type(model.fc) is nn.Linear
    assert [zeros(each.weight) for each in (model.conv, model.fc, model.head)] == [54, 192, 24]
    assert torch.equal(model(x), expected)
    assert model.fc.weight.requires_grad


def test_finalize_a_copy(model, x):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    model.eval()
    twin = copy.deepcopy(model)
    expected = model(x)
    assert pruner.finalize(twin, backend="_torch") is twin
    assert type(twin.fc) is nn.Linear
    assert parametrize.is_parametrized(model.fc)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    pruner.finalize(backend=TORCH)
    assert torch.equal(model(x), expected)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_finalize_leaves_later_parametrizations(model, x):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    parametrize.register_parametrization(model.fc, "weight", Half())
    expected = model.fc.weight.detach().clone()
    pruner.finalize(backend=TORCH)
    assert [type(each) for each in model.fc.parametrizations.weight] == [Half]
    assert torch.equal(model.fc.weight, expected)


def test_two_of_four(model, x):
    pruner = MagnitudePruner(
        model,
        MagnitudePrunerConfig()
        .set_global(None)
        .set_module_type(
            nn.Linear,
            ModuleMagnitudePrunerConfig(op_state_spec={"weight": PruningSpec(pruning_scheme=NMStructured())}),
        ),
    )
    pruner.prepare((x,))
    expected = model.eval()(x)
    with pytest.warns(UserWarning, match=r"fc.weight stays dense: .*torch.float32.*cpu"):
        pruner.finalize(backend=TORCH, semi_structured=True)
    assert ((model.fc.weight.detach().reshape(-1, 4) != 0).sum(1) == 2).all()
    assert torch.equal(model(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_on_a_gpu(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)).to("cuda", dtype)
    x = torch.randn(64, 128, device="cuda", dtype=dtype)
    pruner = MagnitudePruner(model, everywhere(PruningSpec(pruning_scheme=NMStructured())))
    pruner.prepare((x,))
    with torch.no_grad():
        expected = model(x)
        pruner.finalize(backend=TORCH, semi_structured=True)
        assert isinstance(model[0].weight, torch.sparse.SparseSemiStructuredTensor)
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_compiled_training_equals_eager(x):
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Net().eval()
        pruner = MagnitudePruner(model, everywhere(PruningSpec(target_sparsity=0.75), RAMP))
        pruner.prepare((x,))
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        losses.append(train(run, pruner, x, 6))
    assert losses[0] == losses[1]


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


@pytest.mark.parametrize("backend", [ExportBackend.CoreAI, ExportBackend.CoreML, "coreml"])
def test_other_backends(model, x, backend):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    with pytest.raises(NotImplementedError, match=r"finalize\(backend=ExportBackend._TORCH\)"):
        pruner.finalize(backend=backend)
    assert parametrize.is_parametrized(model.fc)


@pytest.mark.parametrize("backend", ["onnx", None, 3])
def test_backends_that_do_not_exist(model, x, backend):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    with pytest.raises(ValueError, match="backend must be one of _torch, coreml, coreai; got"):
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
