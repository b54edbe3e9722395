"""``kmeans``: palettes of vectors, by Lloyd's algorithm, for all blocks at once.

A composition of other operations: assignment is ``palettize``, the sums over clusters are the gradient of
``lookup``. So it runs wherever these do.
"""

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import implementation
from coreai_kernels.reference.layout import to_vectors

__all__ = ["kmeans"]

# Seeding looks at this many vectors a cluster: more change the seeds, not their quality.
_SEEDS_PER_CLUSTER = 256


def kmeans(
    weight: Tensor,
    num_clusters: int,
    *,
    cluster_dim: int,
    block_size: tuple[int, ...],
    weights: Tensor | None = None,
    seed: int = 0,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    restarts: int = 1,
) -> Tensor:
    """Centroids of vectors: k-means++ seeds (Arthur & Vassilvitskii, SODA 2007), then Lloyd's iterations.

    Deterministic: a seed gives the same centroids on every run and for every number of threads; devices agree
    up to the rounding of sums. Waits for the device once an iteration.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor; the latter is rounded to float32.
        num_clusters: 1 to 256.
        cluster_dim: a vector is so many consecutive entries of axis 0.
        block_size: extent of a block along each axis; ``cluster_dim`` must divide the first.
        weights: importance of each element, at least 0, in the shape of ``weight``; a vector has the sum of
            its entries'. A block of which all are 0 counts as unweighted.
        seed: of the random choices.
        max_iterations: at most so many.
        tolerance: stop when no centroid of any block moves by more than this share of the weight's standard
            deviation.
        restarts: seed so many times, and keep the best of each block.

    Returns:
        float32 ``(blocks, num_clusters, cluster_dim)`` on the device of ``weight``. Where vectors are fewer
        than clusters, centroids repeat.

    Raises:
        ValueError: an argument is out of range or does not fit; NaN or an infinity in ``weight`` or
            ``weights``, or a negative one in ``weights``.
        TypeError: ``weight`` or ``weights`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    checks.check_num_clusters(num_clusters)
    checks.check_blocks("block_size", weight, block_size)
    checks.check_vectors("cluster_dim", cluster_dim, block_size)
    for name, value, least in (("max_iterations", max_iterations, 0), ("restarts", restarts, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance}")
    weight = weight.detach()
    if not weight.isfinite().all():
        raise ValueError("weight must be finite; got NaN or an infinity")
    if weights is not None:
        _check_weights(weights, weight)
        weights = weights.detach()
    problem = _Problem(weight, weights, cluster_dim, block_size)
    generator = torch.Generator().manual_seed(seed)
    best = problem.iterate(problem.seeds(num_clusters, generator), max_iterations, tolerance)
    for _ in range(restarts - 1):
        found = problem.iterate(problem.seeds(num_clusters, generator), max_iterations, tolerance)
        better = problem.error(found) < problem.error(best)
        best = torch.where(better[:, None, None], found, best)
    return best


def _check_weights(weights: Tensor, weight: Tensor) -> None:
    checks.check_float_input("weights", weights)
    if weights.shape != weight.shape:
        raise ValueError(
            f"weights must have the shape of weight, {tuple(weight.shape)}; got {tuple(weights.shape)}"
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("weights must be finite and at least 0")


class _Problem:
    """A weight in blocks of vectors, and the importance of each vector."""

    def __init__(self, weight: Tensor, weights: Tensor | None, dim: int, block_size: tuple[int, ...]) -> None:
        self.weight, self.dim, self.block_size = weight, dim, tuple(block_size)
        self.vectors = to_vectors(weight, self.block_size, dim)
        # The importance of each vector as a matrix, one row a block; none where all weigh the same.
        self.mass: Tensor | None = None
        self.weighted = self.vectors
        if weights is not None:
            mass = to_vectors(weights, self.block_size, dim).double().sum(2)
            mass = torch.where((mass > 0).any(1, keepdim=True), mass, 1.0).float()
            self.mass = mass
            self.weighted = self.vectors.float() * mass.unsqueeze(2)

    def seeds(self, clusters: int, generator: torch.Generator) -> Tensor:
        """Vectors drawn one by one, each by its mass times squared distance to those before."""
        blocks, count, dim = self.vectors.shape
        device = self.weight.device
        chosen = torch.randperm(count, generator=generator)[: _SEEDS_PER_CLUSTER * clusters].sort().values
        vectors = self.vectors[:, chosen.to(device)].float()
        mass = vectors.new_ones(vectors.shape[:2]) if self.mass is None else self.mass[:, chosen.to(device)]
        # From the CPU's generator, so that a seed means the same on every device.
        draws = torch.rand(clusters, blocks, 1, generator=generator, dtype=torch.float64).to(device)
        centroids = vectors.new_empty(blocks, clusters, dim)
        nearest = torch.full_like(mass, torch.inf)
        chances = mass.double()
        for cluster in range(clusters):
            total = chances.cumsum(1)
            place = torch.searchsorted(total, draws[cluster] * total[:, -1:], right=True)
            place = place.clamp(max=vectors.size(1) - 1)
            picked = vectors.gather(1, place.unsqueeze(2).expand(-1, -1, dim))
            centroids[:, cluster] = picked[:, 0]
            nearest = torch.minimum(nearest, (vectors - picked).square().sum(2))
            chances = nearest.double() * mass
        return centroids

    def iterate(self, centroids: Tensor, max_iterations: int, tolerance: float) -> Tensor:
        """Lloyd's iterations; a centroid that loses all its vectors stays where it is."""
        blocks, clusters, dim = centroids.shape
        count = self.vectors.size(1)
        assign, segment_sum = implementation("palettize"), implementation("lookup_backward")
        rows, row_block = (blocks * dim, count), (dim, count)
        # A vector's entries lie below each other: a block becomes ``dim`` rows.
        data = self.vectors.transpose(1, 2).reshape(rows)
        weighted = data if self.mass is None else self.weighted.transpose(1, 2).reshape(rows)
        mass = torch.ones((blocks, count), device=data.device) if self.mass is None else self.mass
        limit = (tolerance * self.weight.float().std(correction=0)) ** 2
        for _ in range(max_iterations):
            indices = assign(data, centroids, row_block)
            sums = segment_sum(weighted, indices, row_block, clusters, dim)
            masses = segment_sum(mass, indices, (1, count), clusters, 1)
            moved = torch.where(masses > 0, sums / masses, centroids)
            shift = (moved - centroids).square().sum(2).max()
            centroids = moved
            if bool(shift <= limit):
                break
        return centroids

    def error(self, centroids: Tensor) -> Tensor:
        """Weighted sum of squared errors of each block, float64."""
        indices = implementation("palettize")(self.weight, centroids, self.block_size)
        back = implementation("lookup")(indices, centroids, self.block_size)
        squares = to_vectors((self.weight.float() - back).double().square(), self.block_size, self.dim).sum(2)
        return (squares if self.mass is None else squares * self.mass).sum(1)
