"""``kmeans_1d``: the optimum by exhaustive search, and every backend against the reference."""

import itertools

import numpy
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from tests.kernels.palette_support import many
from tests.kernels.support import Case, assert_same_bits, cases


def squared_error(values: Tensor, weights: Tensor, centroids: Tensor) -> float:
    distance = (values.double()[:, None] - centroids.double()).square().min(1).values
    return float((distance * weights.double()).sum())


def least_error(values: Tensor, weights: Tensor, clusters: int) -> float:
    """Over all partitions of the sorted values into runs."""
    order = values.argsort()
    x, w = values[order].double().numpy(), weights[order].double().numpy()
    best = numpy.inf
    for cuts in itertools.combinations(range(1, len(x)), min(clusters, len(x)) - 1):
        error = 0.0
        for a, b in itertools.pairwise([0, *cuts, len(x)]):
            mean = (x[a:b] * w[a:b]).sum() / w[a:b].sum()
            error += (w[a:b] * (x[a:b] - mean) ** 2).sum()
        best = min(best, error)
    return best


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 8])
def test_least_squares_by_exhaustive_search(backend: str, weighted: bool, clusters: int) -> None:
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(11, generator=generator).round(decimals=1 + seed % 3)
        weights = torch.rand(11, generator=generator) + 0.01 if weighted else torch.ones(11)
        with ck.use_backend(backend):
            found = ck.kmeans_1d(values, clusters, block_size=(11,), weights=weights if weighted else None)
        assert found.shape == (1, clusters, 1)
        assert torch.equal(found, found.sort(dim=1).values)
        # Centroids are rounded to float32.
        error = squared_error(values, weights, found.flatten())
        assert error <= least_error(values, weights, clusters) * (1 + 1e-6) + 1e-12


@many
@given(
    cases(),
    st.sampled_from([1, 2, 3, 16, 100, 256]),
    st.sampled_from([None, 2, 4]),
    st.sampled_from(["none", "some", "zeros"]),
)
def test_backends_agree(case: Case, clusters: int, decimals: int | None, weighting: str) -> None:
    case.special = False
    values = case.tensor()
    # The reference goes through the blocks one by one.
    assume(values.numel() > 0 and torch.Size(case.grid).numel() <= 20)
    clusters = min(clusters, torch.Size(case.block_size).numel())
    generator = torch.Generator().manual_seed(case.seed)
    weights = None
    if weighting != "none":
        keep = torch.rand(case.shape, generator=generator) > 0.3
        weights = torch.rand(case.shape, generator=generator) * keep * (weighting == "some")
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = ck.kmeans_1d(
                values, clusters, block_size=case.block_size, weights=weights, decimals=decimals
            )
    assert_same_bits(results["auto"], results["reference"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decimals", [None, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_blocks(dtype: torch.dtype, decimals: int | None, weighted: bool) -> None:
    """Counting, and the sort of many values, each on several threads."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(170, 200, generator=generator).to(dtype)
    weights = torch.rand(170, 200, generator=generator) if weighted else None
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = ck.kmeans_1d(
                values, 3, block_size=(170, 200), weights=weights, decimals=decimals
            )
    assert_same_bits(results["auto"], results["reference"])


@pytest.mark.parametrize("kind", ["even", "heavy", "clumps"])
def test_bounded_splits(kind: str) -> None:
    """From 32,768 values on, splits are sought where bounds leave room for them; among exact ties, too."""
    values = torch.arange(33_000.0)
    if kind != "even":
        values = torch.randn(33_000, generator=torch.Generator().manual_seed(0))
        values = values.pow(5) if kind == "heavy" else values + 50 * (torch.arange(33_000) % 4)
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = ck.kmeans_1d(values, 5, block_size=(33_000,))
    assert_same_bits(results["auto"], results["reference"])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_few_distinct_values(backend: str) -> None:
    values = torch.tensor([2.0, -0.0, 2.0, 0.0, -1.0])
    with ck.use_backend(backend):
        found = ck.kmeans_1d(values, 5, block_size=(5,)).flatten()
        one = ck.kmeans_1d(torch.zeros(3), 2, block_size=(3,)).flatten()
        weights = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
        weighted = ck.kmeans_1d(values, 3, block_size=(5,), weights=weights).flatten()
    assert found.tolist() == [-1.0, 0.0, 2.0, 2.0, 2.0]
    assert one.tolist() == [0.0, 0.0]
    assert weighted.tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ties_split_early(backend: str) -> None:
    with ck.use_backend(backend):
        found = ck.kmeans_1d(torch.tensor([0.0, 1.0, 2.0]), 2, block_size=(3,))
    assert found.flatten().tolist() == [0.0, 1.5]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("decimals", [-1, 0, 2, 4])
def test_rounds_as_numpy(backend: str, decimals: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    rounded = torch.from_numpy(numpy.round(values.numpy(), decimals))
    with ck.use_backend(backend):
        found = ck.kmeans_1d(values, 8, block_size=(1000,), decimals=decimals)
        expected = ck.kmeans_1d(rounded, 8, block_size=(1000,))
    assert_same_bits(found, expected)


def test_threads_do_not_matter() -> None:
    values = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ck.kmeans_1d(values, 5, block_size=(1 << 17,)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_opcheck() -> None:
    args = (torch.randn(8, 6), torch.rand(8, 6), [4, 6], 3, None)
    torch.library.opcheck(torch.ops.coreai_kernels.kmeans_1d.default, args)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [8, 20_000])
@pytest.mark.parametrize(
    ("value", "weight"), [(NAN, 1.0), (INF, 1.0), (-INF, 0.0), (1.0, -1.0), (1.0, NAN), (1.0, INF)]
)
def test_values_that_have_no_mean(
    backend: str, dtype: torch.dtype, size: int, value: float, weight: float
) -> None:
    # Few distinct ones in the block that is in order: the reference takes its time.
    values, weights = torch.randn(2, size).round(decimals=1).to(dtype), torch.rand(2, size)
    values[1, size // 2], weights[1, size // 2] = value, weight
    with ck.use_backend(backend):
        for decimals in (None, 4):
            with pytest.raises(ValueError, match="block 1 of 2: weight must be finite and weights finite"):
                ck.kmeans_1d(values, 4, block_size=(1, size), weights=weights, decimals=decimals)
        if weight == 1.0:
            with pytest.raises(ValueError, match="block 1 of 2: weight must be finite"):
                ck.kmeans_1d(values, 4, block_size=(1, size))


@pytest.mark.parametrize("size", [7, 300, 20_000])
@pytest.mark.parametrize("decimals", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bool_weights_leave_elements_out(size: int, decimals: int | None, dtype: torch.dtype) -> None:
    """As if they were not there, whatever they are; a block that keeps nothing counts whole."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, 3, generator=generator).to(dtype)
    kept = torch.rand(size, 3, generator=generator) < 0.5
    kept[:3, 0], kept[:, 2] = True, False
    values[~kept[:, 0], 0] = torch.nan
    results = []
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            found = ck.kmeans_1d(values, 3, block_size=(size, 1), weights=kept, decimals=decimals)
            compact = values[kept[:, 0], 0]
            alone = ck.kmeans_1d(compact, 3, block_size=(len(compact),), decimals=decimals)
            whole = ck.kmeans_1d(values[:, 2], 3, block_size=(size,), decimals=decimals)
        assert_same_bits(found[:1], alone)
        assert_same_bits(found[2:], whole)
        results.append(found)
    if size < 1000:
        assert_same_bits(*results)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (TypeError, "weight must be one of", {"weight": torch.ones(4, 8, dtype=torch.int32)}),
        (ValueError, r"num_clusters must be in 1\.\.256; got 0", {"num_clusters": 0}),
        (ValueError, r"num_clusters must be in 1\.\.256; got 257", {"num_clusters": 257}),
        (ValueError, r"num_clusters must be at most 8.*\(2, 4\).*values; got 9", {"num_clusters": 9}),
        (ValueError, "block_size.*does not divide", {"block_size": (3, 8)}),
        (ValueError, "weights must have the shape of weight", {"weights": torch.ones(8, 4)}),
        (TypeError, "weights must be one of", {"weights": torch.ones(4, 8, dtype=torch.int32)}),
        (ValueError, "decimals must be in", {"decimals": 99}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, arguments: dict[str, object]) -> None:
    call = {"weight": torch.randn(4, 8), "num_clusters": 4, "block_size": (2, 4)} | arguments
    with pytest.raises(error, match=text):
        ck.kmeans_1d(**call)
