"""Pruning over training: schedules, one threshold for all layers, finalizing."""

import copy

import pytest
import torch
from pruned_models import RAMP, TORCH, Net, entry, everywhere, simulators, sparsities, train, zeros
from torch import nn
from torch.nn.utils import parametrize
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from torch.utils._python_dispatch import TorchDispatchMode

from coreai_opt.pruning import (
    MagnitudePruner,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    PruningSpec,
)
from coreai_opt.pruning.config import ConstantSparsitySchedule
from coreai_opt.pruning.spec import ChannelStructured, NMStructured


def test_masks_follow_the_schedule(model, x):
    pruner = MagnitudePruner(model, everywhere(PruningSpec(target_sparsity=0.75), RAMP))
    pruner.prepare((x,))
    assert set(sparsities(model).values()) == {0.0}
    previous, changes = 0.0, []
    for step in range(1, 12):
        train(model, pruner, x, 1)
        sparsity = RAMP.compute_sparsity(step, 0.75)
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
    assert pruner.finalize(twin, backend="torch") is twin
    assert type(twin.fc) is nn.Linear
    assert parametrize.is_parametrized(model.fc)
    assert torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)
    pruner.finalize(backend=TORCH)
    assert torch.equal(model(x), expected)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_finalize_folds_parametrizations_of_others_too(model, x):
    pruner = MagnitudePruner(model)
    pruner.prepare((x,))
    parametrize.register_parametrization(model.fc, "weight", Half())
    expected = model.fc.weight.detach().clone()
    pruner.finalize(backend=TORCH)
    assert not parametrize.is_parametrized(model.fc)
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
    with pytest.warns(UserWarning, match="stays dense: torch has no semi-structured form") as warned:
        pruner.finalize(backend=TORCH, semi_structured=True)
    assert [str(each.message).split(" ", 1)[0] for each in warned] == ["fc.weight", "head.weight"]
    assert ((model.fc.weight.detach().reshape(-1, 4) != 0).sum(1) == 2).all()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_is_what_torch_compresses(dtype):
    """torch's conversion, which runs on CPUs, loses nothing, with ties and zeros among the weights."""
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 32)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-3, 4, (64, 128)))
        model[0].weight[0] = 0.0
    pruner = MagnitudePruner(model, everywhere(PruningSpec(pruning_scheme=NMStructured())))
    pruner.prepare((torch.zeros(1, 128, dtype=dtype),))
    model(torch.zeros(1, 128, dtype=dtype))
    masks = [layer.parametrizations.weight[0].mask.clone() for layer in model]
    pruner.finalize(backend=TORCH)
    for layer, mask in zip(model, masks, strict=True):
        weight = layer.weight.detach()
        assert not weight[mask == 0].any()
        values, indices = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, indices), weight)
    dense = torch.ones(32, 64, dtype=dtype)
    assert not torch.equal(
        sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(dense)), dense
    )


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


class NoSynchronisation(TorchDispatchMode):
    """Fails where a GPU would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        assert func.overloadpacket.__name__ not in waits, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("global_threshold", [False, True])
def test_nothing_waits_for_the_device(model, x, global_threshold):
    config = everywhere(PruningSpec(target_sparsity=0.75), RAMP, global_threshold=global_threshold)
    pruner = MagnitudePruner(model, config)
    pruner.prepare((x,))
    with NoSynchronisation():
        for _ in range(4):
            model(x).sum().backward()
            pruner.step()
