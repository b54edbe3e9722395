"""Whole models stay on the fast path, whatever happens beside their simulators."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from coreai_kernels import native
from coreai_kernels.runtime import fast_path_counts, reset_fast_path_counts

from .support import prepared, simulators

pytestmark = pytest.mark.skipif(
    native.missing is not None or native.autograd_missing is not None,
    reason=f"no fast path: {native.missing or native.autograd_missing}",
)

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
STEPS = 4


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


def trained(model: nn.Module, **kwargs: Any) -> dict[str, Any]:
    """The counts of some training steps, after as many to capture in; all calls without a hit are a list."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **kwargs)
    for step in range(2 * STEPS):
        if step == STEPS:
            reset_fast_path_counts()
        optimizer.zero_grad()
        model(X).sum().backward()
        optimizer.step()
    found = fast_path_counts()
    missed = [reason for reason, count in found["misses"].items() if count]
    return {"hits": found["hits"], "others": missed + list(found["refused"])}


@contextmanager
def on_the_model(model: nn.Module) -> Iterator[None]:
    for module in (model, model.first):
        module.register_forward_hook(lambda *_: None)
        module.register_full_backward_hook(lambda *_: None)
    yield


@contextmanager
def on_tensors(model: nn.Module) -> Iterator[None]:
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad)
        parameter.register_post_accumulate_grad_hook(lambda _: None)
    yield


@contextmanager
def on_registrations(model: nn.Module) -> Iterator[None]:
    handle = torch_module.register_module_parameter_registration_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def on_other_modules(model: nn.Module) -> Iterator[None]:
    nn.Linear(2, 2).register_forward_hook(lambda *_: None)
    yield


@pytest.mark.parametrize("hooks", [on_the_model, on_tensors, on_registrations, on_other_modules])
def test_hooks_of_others_do_not_matter(hooks: Any) -> None:
    _, model = prepared(Mlp(), X)
    with hooks(model):
        assert trained(model) == {"hits": STEPS * len(simulators(model)), "others": []}


def _train_sharded(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    _, model = prepared(Mlp(), X)
    mesh = init_device_mesh("cpu", (2,))
    for module in (model.first, model.last, model):
        fully_shard(module, mesh=mesh)
    counts = trained(model)
    Path(f"{folder}/{rank}.json").write_text(json.dumps({**counts, "simulators": len(simulators(model))}))
    dist.destroy_process_group()


def test_weights_that_fsdp_shards_are_simulated_on_the_fast_path(tmp_path: Path) -> None:
    # Their values lie elsewhere after each gathering.
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["simulators"] > 2
        assert (found["hits"], found["others"]) == (STEPS * found["simulators"], [])
