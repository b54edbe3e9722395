"""``kmeans``: convergence, quality, determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels.ops.library import implementation
from tests.kernels.palette_support import many
from tests.kernels.support import assert_same_bits


def error(
    weight: Tensor, centroids: Tensor, block_size: tuple[int, ...], weights: Tensor | None = None
) -> float:
    back = ck.lookup(ck.palettize(weight, centroids, block_size=block_size), centroids, block_size=block_size)
    squares = (weight - back).square()
    return float((squares if weights is None else squares * weights).sum())


def clumps(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors around eight far points, as a weight of 2 blocks of rows; and the points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2, 8, dim, generator=generator) * 10
    which = torch.randint(0, 8, (2, 200), generator=generator)
    vectors = points.gather(1, which[:, :, None].expand(-1, -1, dim))
    vectors = vectors + 0.01 * torch.randn(vectors.shape, generator=generator)
    return vectors.transpose(1, 2).reshape(2 * dim, 200), points


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_finds_clumps(backend: str, dim: int) -> None:
    weight, points = clumps(dim)
    with ck.use_backend(backend):
        found = ck.kmeans(weight, 8, cluster_dim=dim, block_size=(dim, 200), restarts=4)
    assert found.shape == (2, 8, dim)
    distance = (points[:, :, None] - found[:, None]).square().sum(3).sqrt()
    assert float(distance.min(2).values.max()) < 0.02
    assert float(distance.min(1).values.max()) < 0.02


@many
@given(
    tries=st.integers(1, 3),
    blocks=st.integers(1, 4),
    dim=st.sampled_from([1, 2, 3, 4, 9]),
    count=st.sampled_from([1, 5, 16, 33, 700]),
    clusters=st.sampled_from([1, 2, 7, 16, 33, 256]),
    weighting=st.sampled_from(["none", "some", "zeros"]),
    coarse=st.booleans(),
    iterations=st.sampled_from([0, 1, 2, 30]),
    limit=st.sampled_from([0.0, 1e-3]),
    seed=st.integers(0, 999),
)
def test_iterations_on_all_backends_agree(
    tries: int,
    blocks: int,
    dim: int,
    count: int,
    clusters: int,
    weighting: str,
    coarse: bool,
    iterations: int,
    limit: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(blocks, dim, count, generator=generator)
    centroids = torch.randn(tries, blocks, clusters, dim, generator=generator)
    if coarse:  # exact ties, equal centroids, clusters without a vector
        vectors, centroids = vectors.round(), centroids.round()
    mass = None
    if weighting != "none":
        keep = torch.rand(blocks, count, generator=generator) > 0.3
        mass = torch.rand(blocks, count, generator=generator) * keep * (weighting == "some")
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = implementation("lloyd")(vectors, mass, centroids, iterations, limit)
    assert_same_bits(results["auto"], results["reference"])


def test_opcheck() -> None:
    args = (torch.randn(2, 3, 40), torch.rand(2, 40), torch.randn(5, 2, 4, 3), 10, 1e-6)
    torch.library.opcheck(torch.ops.coreai_kernels.lloyd.default, args)


def test_converged_centroids_are_means() -> None:
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(16, 40, generator=torch.Generator().manual_seed(1))
    found = ck.kmeans(weight, 5, cluster_dim=2, block_size=(16, 40), weights=weights, tolerance=0.0)
    indices = ck.palettize(weight, found, block_size=(16, 40))
    vectors = weight.reshape(8, 2, 40).transpose(1, 2).reshape(-1, 2)
    mass = weights.reshape(8, 2, 40).sum(1).reshape(-1)
    for j in range(5):
        inside = indices.reshape(-1) == j
        mean = (vectors[inside] * mass[inside, None]).sum(0) / mass[inside].sum()
        torch.testing.assert_close(found[0, j], mean, rtol=1e-5, atol=1e-5)


def test_scalars_come_near_the_optimum() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    best = error(weight, ck.kmeans_1d(weight, 8, block_size=(64, 64)), (64, 64))
    found = ck.kmeans(weight, 8, cluster_dim=1, block_size=(64, 64), restarts=3)
    assert best * (1 - 1e-6) <= error(weight, found, (64, 64)) <= best * 1.05


def test_more_restarts_are_no_worse() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for restarts in (1, 2, 5):
        found = ck.kmeans(weight, 16, cluster_dim=4, block_size=(32, 64), restarts=restarts)
        errors.append(error(weight, found, (32, 64)))
    assert errors == sorted(errors, reverse=True)


def test_a_seed_decides() -> None:
    weight = torch.randn(64, 300)
    kwargs = {"cluster_dim": 2, "block_size": (32, 300)}
    one, again = (ck.kmeans(weight, 16, seed=7, **kwargs) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, ck.kmeans(weight, 16, seed=8, **kwargs))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 2)
        assert torch.equal(one, ck.kmeans(weight, 16, seed=7, **kwargs))
    finally:
        torch.set_num_threads(threads)


def test_column_blocks_are_row_blocks_of_the_transposed() -> None:
    weight = torch.randn(8, 30)
    columns = ck.kmeans(weight, 4, cluster_dim=1, block_size=(8, 10))
    rows = ck.kmeans(
        weight.reshape(8, 3, 10).transpose(0, 1).reshape(24, 10), 4, cluster_dim=1, block_size=(8, 10)
    )
    assert torch.equal(columns, rows)


def test_fewer_distinct_vectors_than_clusters() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(1, 4)
    found = ck.kmeans(weight, 5, cluster_dim=2, block_size=(2, 8))
    assert error(weight, found, (2, 8)) == 0.0
    assert len(found[0].unique(dim=0)) == 2


def test_zero_weights_count_as_none() -> None:
    weight = torch.randn(4, 50)
    kwargs = {"cluster_dim": 2, "block_size": (4, 50)}
    plain = ck.kmeans(weight, 4, **kwargs)
    torch.testing.assert_close(ck.kmeans(weight, 4, weights=torch.zeros(4, 50), **kwargs), plain)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("cluster_dim must divide the 4 rows of a block; got 3", {"cluster_dim": 3}),
        ("num_clusters must be in", {"num_clusters": 300}),
        (r"num_clusters must be at most 16.*\(4, 8\).*vectors of 2 values; got 17", {"num_clusters": 17}),
        ("max_iterations must be at least 0", {"max_iterations": -1}),
        ("restarts must be at least 1", {"restarts": 0}),
        ("tolerance must be at least 0", {"tolerance": float("nan")}),
        ("weight must be finite", {"weight": torch.full((4, 8), float("nan"))}),
        ("weights must have the shape", {"weights": torch.ones(4, 7)}),
        ("weights must be finite and at least 0", {"weights": torch.full((4, 8), -1.0)}),
    ],
)
def test_bad_arguments(text: str, arguments: dict[str, object]) -> None:
    call = {"weight": torch.randn(4, 8), "num_clusters": 2, "cluster_dim": 2, "block_size": (4, 8)}
    with pytest.raises(ValueError, match=text):
        ck.kmeans(**call | arguments)
