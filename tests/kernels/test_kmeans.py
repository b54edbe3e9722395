"""``kmeans``: convergence, quality, determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels.ops import kmeans as kmeans_module
from coreai_kernels.ops.kmeans_search import Problem
from coreai_kernels.reference.kmeans import PART
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
    offset=st.sampled_from([0.0, 50.0]),
    clusters=st.sampled_from([1, 2, 7, 16, 33, 256]),
    weighting=st.sampled_from(["none", "some", "zeros"]),
    coarse=st.booleans(),
    iterations=st.sampled_from([0, 1, 2, 30]),
    tolerance=st.sampled_from([0.0, 1e-3]),
    seed=st.integers(0, 999),
)
def test_iterations_on_all_backends_agree(
    tries: int,
    blocks: int,
    dim: int,
    count: int,
    offset: float,
    clusters: int,
    weighting: str,
    coarse: bool,
    iterations: int,
    tolerance: float,
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
    check_iterations(vectors + offset, mass, centroids + offset, iterations, tolerance)


def check_iterations(
    vectors: Tensor, mass: Tensor | None, centroids: Tensor, iterations: int, tolerance: float
) -> None:
    problem = Problem.of(vectors, mass)
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = problem.lloyd(centroids, iterations, tolerance)
    for found, expected in zip(results["auto"], results["reference"], strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dim", [2, 3])
def test_iterations_over_parts(threads: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, dim, 2 * PART + 1000, generator=generator)
    mass = torch.rand(1, vectors.size(2), generator=generator) if dim == 2 else None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_iterations(vectors, mass, torch.randn(2, 1, 9, dim, generator=generator), 5, 0.0)
    finally:
        torch.set_num_threads(before)


def test_what_iterations_return() -> None:
    """By definition, with float64 sums in any order."""
    generator = torch.Generator().manual_seed(0)
    vectors, mass = torch.randn(1, 2, 60, generator=generator), torch.rand(1, 60, generator=generator)
    start = torch.randn(1, 1, 5, 2, generator=generator)
    for iterations in (0, 40):
        found = Problem.of(vectors, mass).lloyd(start, iterations, 0.0)
        centroids, points = found.centroids[0, 0].double(), vectors[0].T.double()
        distances = (points[:, None] - centroids).square()
        nearest = distances.sum(2).argmin(1)
        for j in range(5):
            inside = mass[0, nearest == j].double()
            own = points[nearest == j]
            torch.testing.assert_close(found.masses[0, 0, j], inside.sum())
            spread = (inside[:, None] * (own - centroids[j]).square()).sum(0)
            torch.testing.assert_close(found.spread[0, 0, j], spread)
            if iterations and len(own):
                mean = (own * inside[:, None]).sum(0) / inside.sum()
                torch.testing.assert_close(centroids[j], mean, rtol=1e-6, atol=1e-6)


def test_opcheck() -> None:
    problem = Problem.of(torch.randn(2, 3, 40), torch.rand(2, 40))
    args = (problem.vectors, problem.mass, torch.randn(5, 2, 4, 3), problem.center, problem.total, 10, 1e-6)
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
    found = ck.kmeans(weight, 8, cluster_dim=1, block_size=(64, 64))
    assert best * (1 - 1e-6) <= error(weight, found, (64, 64)) <= best * (1 + 1e-3)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_search_beats_the_best_of_many_starts(heavy: bool) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    if heavy:
        weight = weight.pow(3)
    kwargs = {"cluster_dim": 2, "block_size": (64, 64)}
    plain = [
        error(weight, ck.kmeans(weight, 32, restarts=1, swaps=0, seed=seed, **kwargs), (64, 64))
        for seed in range(20)
    ]
    assert error(weight, ck.kmeans(weight, 32, **kwargs), (64, 64)) < min(plain)


def test_a_search_by_a_part_of_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(64, 256, generator=torch.Generator().manual_seed(1))
    kwargs = {"cluster_dim": 2, "block_size": (32, 256), "weights": weights}
    by_all = ck.kmeans(weight, 8, **kwargs)
    monkeypatch.setattr(kmeans_module, "_SEARCHED", 1000)
    by_part = ck.kmeans(weight, 8, **kwargs)
    errors = [error(weight, found, (32, 256), weights) for found in (by_all, by_part)]
    assert errors[1] < 1.01 * errors[0]
    indices = ck.palettize(weight, by_part, block_size=(32, 256))[:16].reshape(-1)
    vectors = weight[:32].reshape(16, 2, 256).transpose(1, 2).reshape(-1, 2)
    mass = weights[:32].reshape(16, 2, 256).sum(1).reshape(-1)
    for j in range(8):
        inside = indices == j
        mean = (vectors[inside] * mass[inside, None]).sum(0) / mass[inside].sum()
        torch.testing.assert_close(by_part[0, j], mean, rtol=1e-3, atol=1e-3)


def test_a_seed_decides() -> None:
    weight = torch.randn(64, 300)
    kwargs = {"cluster_dim": 2, "block_size": (32, 300), "restarts": 4, "swaps": 2}
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
        ("swaps must be at least 0", {"swaps": -1}),
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


NORMAL = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
BLOCKS = {"cluster_dim": 2, "block_size": (2, 256)}


def test_more_effort_leaves_less_error() -> None:
    efforts = [
        {"restarts": 1, "candidates": 1, "max_iterations": 1},
        {"restarts": 1, "candidates": 1},
        {"restarts": 20, "candidates": 4, "tolerance": 0.0},
    ]
    errors = [error(NORMAL, ck.plain_kmeans(NORMAL, 16, **BLOCKS, **each), (2, 256)) for each in efforts]
    assert errors[0] > 1.05 * errors[1]
    assert errors[1] > 1.01 * errors[2]
    # Neither settings nor swaps make up for the search.
    assert error(NORMAL, ck.kmeans(NORMAL, 16, **BLOCKS), (2, 256)) < errors[2]


def test_plain_runs_are_the_best_of_their_restarts() -> None:
    many_runs = ck.plain_kmeans(NORMAL, 16, restarts=5, **BLOCKS)
    assert torch.equal(many_runs, ck.plain_kmeans(NORMAL, 16, restarts=5, **BLOCKS))
    one = ck.plain_kmeans(NORMAL, 16, restarts=1, **BLOCKS)
    assert error(NORMAL, many_runs, (2, 256)) < error(NORMAL, one, (2, 256))
    assert not torch.equal(many_runs, ck.plain_kmeans(NORMAL, 16, restarts=5, seed=1, **BLOCKS))


def test_plain_runs_end_at_weighted_means() -> None:
    weights = torch.rand(4, 256, generator=torch.Generator().manual_seed(1))
    found = ck.plain_kmeans(NORMAL, 8, weights=weights, tolerance=0.0, max_iterations=1000, **BLOCKS)
    indices = ck.palettize(NORMAL, found, block_size=(2, 256))[0]
    mass = weights[:2].sum(0)
    for j in range(8):
        inside = indices == j
        mean = (NORMAL[:2, inside] * mass[inside]).sum(1) / mass[inside].sum()
        torch.testing.assert_close(found[0, j], mean, rtol=1e-4, atol=1e-5)


def test_plain_runs_of_equal_vectors() -> None:
    found = ck.plain_kmeans(torch.ones(2, 5), 3, cluster_dim=2, block_size=(2, 5))
    assert torch.equal(found, torch.ones(1, 3, 2))


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("num_clusters must be at most 16", {"num_clusters": 17}),
        ("max_iterations must be at least 1", {"max_iterations": 0}),
        ("restarts must be at least 1", {"restarts": 0}),
        ("candidates must be at least 1", {"candidates": 0}),
        ("tolerance must be at least 0", {"tolerance": -1.0}),
    ],
)
def test_bad_settings(text: str, arguments: dict[str, object]) -> None:
    call = {"weight": torch.randn(4, 8), "num_clusters": 2, "cluster_dim": 2, "block_size": (4, 8)}
    with pytest.raises(ValueError, match=text):
        ck.plain_kmeans(**call | arguments)
