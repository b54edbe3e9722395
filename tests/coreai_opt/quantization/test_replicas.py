"""Replicas, as ``nn.DataParallel`` makes them: each works with its own weights and state."""

import copy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate

from coreai_opt.quantization import QuantizerConfig

from .support import WEIGHTS_ONLY, globally, prepared

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
CONFIGS = {"all": QuantizerConfig(execution_mode="eager"), "weights": globally(**WEIGHTS_ONLY)}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@pytest.fixture
def replicas(monkeypatch) -> Iterator:
    """Replicas on the CPU; the parameters of the second one are doubled."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def broadcast(tensors, devices, detach=False):
        def copy_of(tensor: Tensor, device: int) -> Tensor:
            copied = tensor.detach().clone() if detach else tensor.clone()
            return copied * (1 + device) if isinstance(tensor, nn.Parameter) else copied

        return [[copy_of(tensor, device) for tensor in tensors] for device in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    return lambda model, detach=False: replicate(model, [0, 1], detach)


def doubled(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    return copied


def trained(config: str) -> nn.Module:
    torch.manual_seed(0)
    model = prepared(Residual(), X, config=CONFIGS[config])[1].train()
    for _ in range(2):
        model(X).sum().backward()
    model.zero_grad()
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_a_replica_has_its_own_weights(config: str, replicas) -> None:
    model = trained(config)
    other = doubled(model)
    one, two = (replica(X) for replica in replicas(model))
    assert torch.equal(one, copy.deepcopy(model)(X))
    assert torch.equal(two, other(X))
    two.square().sum().backward()
    other.zero_grad()
    other(X).square().sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, 2 * theirs.grad)


@pytest.mark.parametrize("config", CONFIGS)
def test_replicas_run_in_threads(config: str, replicas) -> None:
    model = trained(config)
    expected = [model(X).detach(), doubled(model)(X).detach()]
    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda replica: replica(X), replicas(model)))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_replicas_without_gradients(replicas) -> None:
    model = trained("weights").eval()
    expected = doubled(model)
    with torch.no_grad():
        model(X)  # what the model holds is not for its replicas
        assert torch.equal(replicas(model, detach=True)[1](X), expected(X))


def test_the_model_itself_stays_as_it_was(replicas) -> None:
    model = trained("all")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = {module: dict(module._forward_hooks) for module in model.modules()}
    replicas(model)[1](X)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(module._forward_hooks == before for module, before in hooks.items())
