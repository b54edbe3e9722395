"""A Mac's GPU gets the reference: without a Mac, on CPU tensors that may do only what MPS tensors can.

``test_mps_device.py`` is for a Mac.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import wide
from coreai_kernels.ops import library
from coreai_kernels.reference import block_mask
from coreai_kernels.reference.palettize import decision_bounds
from tests.kernels.mps_rules import MpsRules
from tests.kernels.operator_samples import INEXACT, SAMPLES
from tests.kernels.support import assert_same_bits

# Clustering happens on the CPU.
ON_HOST = {"kmeans_1d", "lloyd"}


@pytest.fixture(autouse=True)
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(wide, "has_float64", lambda device: False)
    return


def test_every_operator_is_registered() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("coreai_kernels::")]
    assert len(names) > 25
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(name, "MPS") for name in names)
    assert {name.split("::")[1] for name in names} == {key.split(", ")[0] for key in SAMPLES} | ON_HOST


@pytest.mark.parametrize("sample", SAMPLES)
def test_references_use_what_there_is(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, args = sample.split(", ")[0], SAMPLES[sample]()
    again = copy.deepcopy(args)  # some operators write into their arguments
    reference = library._functions[name]["reference"]
    config = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.float64]
    with torch.no_grad(), MpsRules(config):
        found = reference(*args)
    monkeypatch.undo()
    with torch.no_grad():
        expected = reference(*again)
    for a, b in zip(leaves((found, args)), leaves((expected, again)), strict=True):
        if name in INEXACT:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert_same_bits(a, b, sample)


def leaves(found: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, Tensor)]


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("MPS has no torch.float64", lambda x: x.double()),
        ("MPS has no torch.float8", lambda x: x.to(torch.float8_e4m3fn)),
        ("_local_scalar_dense makes the host wait", lambda x: x.sum().item()),
        ("nonzero makes the host wait", lambda x: x.nonzero()),
        ("index.Tensor makes the host wait", lambda x: x[x > 0]),
        ("geqrf has no kernel", lambda x: torch.geqrf(x)),
        (
            "fake_quantize_per_tensor.* has no",
            lambda x: torch.fake_quantize_per_tensor_affine(x, 1.0, 0, 0, 9),
        ),
        ("is not made of torch's operators", lambda x: torch.ops.coreai_kernels.pack_bits(x.byte(), 4)),
    ],
)
def test_the_rules_refuse(text: str, call: Callable[[Tensor], Any]) -> None:
    with MpsRules(), pytest.raises(AssertionError, match=text):
        call(torch.randn(4, 4))


EXTREMES = torch.tensor(
    [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 2.0**-149, 2.0**-126, 3.4e38, -3.4e38, 2.0**126]
)


def magnitudes_of_all_kinds(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-40, 38, (rows, columns), generator=generator).float()
    x = torch.randn(rows, columns, generator=generator) * torch.where(exponents > -30, 10.0**exponents, 1.0)
    odd = torch.randint(0, len(EXTREMES), (rows, columns), generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.02, EXTREMES[odd], x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_norms_without_float64_are_the_same(dtype: torch.dtype, seed: int) -> None:
    x = magnitudes_of_all_kinds(64, 32, seed) * 10.0 ** (-10 * seed)
    for block_size in ((1, 32), (1, 1), (4, 8), (64, 32)):
        found = block_mask.norm_bits(x.to(dtype), block_size).view(torch.float64)
        torch.testing.assert_close(
            found, block_mask.block_norms(x.to(dtype), block_size), rtol=0, atol=0, equal_nan=True
        )


def test_norms_round_to_even_as_float64_does() -> None:
    count = torch.tensor([0, 1, 2**53 - 1, 2**53 + 1, 2**53 + 3, 2**54 - 1, 2**55 + 2, 2**55 + 6, 2**61 - 1])
    bits = block_mask._scaled_bits(count, torch.full_like(count, 900))
    assert torch.equal(bits.view(torch.float64), count.double() * 2.0 ** (900 - 1023))


def exact_bounds(low: Tensor, high: Tensor, upper_has_lower_index: bool) -> Tensor:
    """Of float64 midpoints: the largest float32 not above, or below, them."""
    midpoint = (low.double() + high.double()) / 2
    bounds = midpoint.float()
    down = torch.nextafter(bounds, torch.full_like(bounds, -torch.inf))
    bounds = torch.where(bounds.double() > midpoint, down, bounds)
    down = torch.nextafter(bounds, torch.full_like(bounds, -torch.inf))
    return torch.where((bounds.double() == midpoint) & upper_has_lower_index, down, bounds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_midpoints_without_float64_are_the_same(seed: int, reverse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    any_bits = (
        torch.randint(-(2**31), 2**31, (20000, 2), generator=generator).to(torch.int32).view(torch.float32)
    )
    first = torch.randn(20000, generator=generator)
    shift = torch.randint(-60, -20, (20000,), generator=generator).float()
    far_apart = torch.stack([first, torch.randn(20000, generator=generator) * 2.0**shift], 1)
    # Where float64's last place decides: powers of two beside other powers of two.
    powers = torch.stack(
        [first.sign() * 2.0 ** (shift + 40), first.sign() * 2.0 ** (shift + 40) * 2.0**-53], 1
    )
    powers[:, 1] *= torch.tensor(
        [1.0, -1.0, 0.5, -0.5, 1 + 2.0**-23, -1 - 2.0**-23, -0.5 - 2.0**-24, 2.0]
    ).repeat(2500)
    extremes = EXTREMES[torch.randint(0, len(EXTREMES), (20000, 2), generator=generator)]
    tables = torch.cat([any_bits, far_apart, powers, extremes])
    tables = tables[~tables.isnan().any(1) & (tables[:, 0] != tables[:, 1])]
    low, high = tables.amin(1, keepdim=True), tables.amax(1, keepdim=True)
    found, _ = decision_bounds(torch.cat([high, low] if reverse else [low, high], 1))
    assert_same_bits(found, exact_bounds(low + 0.0, high + 0.0, reverse))


def test_clustering_happens_on_the_cpu() -> None:
    weight, weights = torch.randn(16, 24), torch.rand(16, 24)
    kwargs: dict[str, Any] = {"cluster_dim": 2, "block_size": (16, 24), "weights": weights}
    assert ck.kmeans(weight, 4, **kwargs).shape == (1, 4, 2)
    assert ck.plain_kmeans(weight, 4, **kwargs).shape == (1, 4, 2)
