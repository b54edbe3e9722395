"""Every operator on the tensors of a Mac's GPU, beside the reference on the CPU (`make mps-check`).

Where there is no such GPU, the operators of the CPU stand in: so these tests themselves are tried everywhere.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import coreai_kernels as ck
import coreai_opt
from coreai_kernels.ops import library
from tests.kernels.operator_samples import INEXACT, SAMPLES
from tests.kernels.support import assert_same_bits

DEVICE = torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def moved(args: Any) -> Any:
    """On the device; float64, which is for what operators read on the host, stays."""
    return tree_map(
        lambda x: x.to(DEVICE) if isinstance(x, Tensor) and x.dtype != torch.float64 else x,
        copy.deepcopy(args),
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_operators(sample: str) -> None:
    name = sample.split(", ")[0]
    torch.manual_seed(0)
    args = SAMPLES[sample]()
    on_device = moved(args)
    with torch.no_grad():
        found = getattr(torch.ops.coreai_kernels, name).default(*on_device)
        expected = library._functions[name]["reference"](*args)
    pairs = zip(tree_leaves((found, on_device)), tree_leaves((expected, args)), strict=True)
    for a, b in ((a, b) for a, b in pairs if isinstance(a, Tensor)):
        if name in INEXACT:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert_same_bits(a.cpu(), b, sample)


@pytest.mark.parametrize("cluster_dim", [1, 2])
def test_clustering(cluster_dim: int) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    kwargs: dict[str, Any] = {"cluster_dim": cluster_dim, "block_size": (16, 24)}
    found = ck.kmeans(weight.to(DEVICE), 4, **kwargs)
    assert found.device.type == DEVICE.type
    assert_same_bits(found.cpu(), ck.kmeans(weight, 4, **kwargs))


@pytest.mark.parametrize("technique", ["quantize", "prune", "palettize"])
def test_a_model_trains(technique: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).to(DEVICE)
    x, labels = torch.randn(4, 3, 8, 8, device=DEVICE), torch.randint(10, (4,), device=DEVICE)
    kind = {"quantize": "w8a8", "prune": 0.5, "palettize": 4}[technique]
    model, compressor = getattr(coreai_opt, technique)(model, x, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, torch.tensor(losses)))
    compressor.finalize()
    assert bool(model(x).isfinite().all())
