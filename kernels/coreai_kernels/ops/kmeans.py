"""``kmeans``: palettes of vectors, for all blocks at once.

Lloyd's iterations are one operator, with many tries at a time; what to try is chosen in plain torch, on any
device (see ``kmeans_search.py``).
"""

import torch
from torch import Tensor

from coreai_kernels import wide
from coreai_kernels.ops import checks
from coreai_kernels.ops.kmeans_search import SMALL, Problem, search, seeds
from coreai_kernels.ops.library import define
from coreai_kernels.reference import kmeans as reference
from coreai_kernels.reference.layout import to_vectors
from coreai_kernels.triton import registry as triton

__all__ = ["kmeans", "plain_kmeans"]

# The search looks at so many vectors of a block; the solution that it finds is then brought to rest with all.
_SEARCHED = 1 << 18
# Where clusters are few there are few swaps, and many starts cost little; the less, the smaller the block.
_LEAST_RESTARTS, _MOST_RESTARTS, _RESTARTS_TIMES_CLUSTERS = 8, 64, 512
_MOST_RESTARTS_IF_SMALL = 128


def _fake(
    vectors: Tensor,
    mass: Tensor | None,
    centroids: Tensor,
    center: Tensor,
    total: Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    spread = torch.empty_like(centroids, dtype=torch.float64)
    return torch.empty_like(centroids), spread.new_empty(spread.shape[:3]), spread


define(
    "lloyd",
    "(Tensor vectors, Tensor? mass, Tensor centroids, Tensor center, Tensor total, int max_iterations, "
    "float tolerance) -> (Tensor, Tensor, Tensor)",
    reference=reference.lloyd,
    fake=_fake,
    triton=triton.get("lloyd"),
)


def kmeans(
    weight: Tensor,
    num_clusters: int,
    *,
    cluster_dim: int,
    block_size: tuple[int, ...],
    weights: Tensor | None = None,
    seed: int = 0,
    max_iterations: int = 300,
    tolerance: float = 1e-8,
    restarts: int | None = None,
    swaps: int = 20,
) -> Tensor:
    """Centroids of vectors with a small sum of squared errors, for each block of a tensor.

    Starts are drawn by k-means++ (Arthur & Vassilvitskii, SODA 2007) and improved by Lloyd's iterations; the
    best of them is improved by swaps, which merge two clusters and split a third. Of a block of more than
    262,144 vectors the search sees that many; in the last iterations all take part.

    Deterministic: a seed gives the same centroids on every run and for every number of threads; devices agree
    up to the rounding of sums. Waits for the device.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor; the latter is rounded to float32.
        num_clusters: 1 to 256, and no more than a block has vectors.
        cluster_dim: a vector is so many consecutive entries of axis 0.
        block_size: extent of a block along each axis; ``cluster_dim`` must divide the first.
        weights: importance of each element, at least 0, in the shape of ``weight``; a vector has the sum of
            its entries'. A block of which all are 0 counts as unweighted.
        seed: of the random choices.
        max_iterations: Lloyd's iterations at most, in the end.
        tolerance: these stop when one lowers a block's error by no more than this share of it.
        restarts: how many starts; None for 8 to 128, the more the fewer clusters and vectors there are.
        swaps: rounds of swaps at most; they end when several in turn find nothing better.

    Returns:
        float32 ``(blocks, num_clusters, cluster_dim)`` on the device of ``weight``. Where distinct vectors
        are fewer than clusters, centroids repeat.

    Raises:
        ValueError: an argument is out of range or does not fit; NaN or an infinity in ``weight`` or
            ``weights``, or a negative one in ``weights``.
        TypeError: ``weight`` or ``weights`` is not floating point.
    """
    problem = _problem(weight, num_clusters, cluster_dim, block_size, weights)
    if restarts is None:
        restarts = _restarts(problem.vectors.size(2), num_clusters)
    _check_numbers(max_iterations=(max_iterations, 0), restarts=(restarts, 1), swaps=(swaps, 0))
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance}")
    generator = torch.Generator().manual_seed(seed)
    found = search(problem.sample(_SEARCHED, generator), num_clusters, restarts, swaps, generator)
    return problem.lloyd(found.centroids, max_iterations, tolerance).centroids[0].to(weight.device)


def plain_kmeans(
    weight: Tensor,
    num_clusters: int,
    *,
    cluster_dim: int,
    block_size: tuple[int, ...],
    weights: Tensor | None = None,
    seed: int = 0,
    restarts: int = 5,
    candidates: int = 2,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> Tensor:
    """:func:`kmeans` without its search: Lloyd's iterations from k-means++, several times.

    Every start sees all vectors, and every run goes on until ``tolerance`` or ``max_iterations`` ends it. The
    run with the least error counts. Reproducible as :func:`kmeans` is.

    Args:
        weight: as for :func:`kmeans`.
        num_clusters: as for :func:`kmeans`.
        cluster_dim: as for :func:`kmeans`.
        block_size: as for :func:`kmeans`.
        weights: as for :func:`kmeans`.
        seed: of the random choices.
        restarts: how many runs.
        candidates: how many vectors are drawn for each next start, of which the best is taken.
        max_iterations: of each run at most.
        tolerance: a run stops when an iteration lowers the error by no more than this share of it.

    Returns:
        float32 ``(blocks, num_clusters, cluster_dim)`` on the device of ``weight``.

    Raises:
        ValueError, TypeError: see :func:`kmeans`.
    """
    problem = _problem(weight, num_clusters, cluster_dim, block_size, weights)
    _check_numbers(max_iterations=(max_iterations, 1), restarts=(restarts, 1), candidates=(candidates, 1))
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance}")
    generator = torch.Generator().manual_seed(seed)
    best = None
    for _ in range(restarts):
        starts = seeds(problem, num_clusters, 1, generator, candidates=candidates, sampled=False)
        found = problem.lloyd(starts, max_iterations, tolerance)
        best = found if best is None else best.or_better(found, found.error < best.error)
    assert best is not None
    return best.centroids[0].to(weight.device)


def _problem(
    weight: Tensor,
    num_clusters: int,
    cluster_dim: int,
    block_size: tuple[int, ...],
    weights: Tensor | None,
) -> Problem:
    """The arguments of k-means as a problem, once they are checked.

    It lies on the CPU where the weight's device lacks float64.
    """
    checks.check_float_input("weight", weight)
    checks.check_blocks("block_size", weight, block_size)
    checks.check_vectors("cluster_dim", cluster_dim, block_size)
    checks.check_num_clusters(num_clusters, block_size, cluster_dim)
    device = weight.device if wide.has_float64(weight.device) else "cpu"
    weight = weight.detach().to(device)
    if not weight.isfinite().all():
        raise ValueError("weight must be finite; got NaN or an infinity")
    mass = None
    if weights is not None:
        weights = weights.detach().to(device)
        _check_weights(weights, weight)
        mass = to_vectors(weights, tuple(block_size), cluster_dim).double().sum(2)
    return Problem.of(to_vectors(weight, tuple(block_size), cluster_dim).transpose(1, 2), mass)


def _check_numbers(**numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def _restarts(vectors: int, clusters: int) -> int:
    small = vectors * clusters <= SMALL
    most = _MOST_RESTARTS_IF_SMALL if small else _MOST_RESTARTS
    return max(_LEAST_RESTARTS, min(most, _RESTARTS_TIMES_CLUSTERS // clusters))


def _check_weights(weights: Tensor, weight: Tensor) -> None:
    checks.check_float_input("weights", weights)
    if weights.shape != weight.shape:
        raise ValueError(
            f"weights must have the shape of weight, {tuple(weight.shape)}; got {tuple(weights.shape)}"
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("weights must be finite and at least 0")
