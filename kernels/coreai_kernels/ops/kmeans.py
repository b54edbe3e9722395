"""``kmeans``: palettes of vectors, by Lloyd's algorithm, for all blocks at once.

Seeds are drawn by plain torch on any device. The iterations are one operator: fused on the CPU, and elsewhere
composed of ``palettize``, which assigns, and of the gradient of ``lookup``, which sums over clusters.
"""

import math

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import kmeans as reference
from coreai_kernels.reference.layout import to_vectors

__all__ = ["kmeans"]

# Seeding looks at this many vectors a cluster: more change the seeds, not their quality.
_SEEDS_PER_CLUSTER = 256
# Tries are seeded together, as far as distances to their candidates stay this few.
_SEEDING = 1 << 18


def _composed(
    vectors: Tensor, mass: Tensor | None, centroids: Tensor, max_iterations: int, limit: float
) -> Tensor:
    assign, segment_sum = implementation("palettize"), implementation("lookup_backward")
    return reference.lloyd(vectors, mass, centroids, max_iterations, limit, assign, segment_sum)


def _fake(
    vectors: Tensor, mass: Tensor | None, centroids: Tensor, max_iterations: int, limit: float
) -> Tensor:
    return torch.empty_like(centroids)


define(
    "lloyd",
    "(Tensor vectors, Tensor? mass, Tensor centroids, int max_iterations, float limit) -> Tensor",
    reference=reference.lloyd,
    fake=_fake,
    triton=_composed,
)


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

    Each seed is the best of ``2 + log(num_clusters)`` drawn (the greedy variant of the same paper's authors).

    Deterministic: a seed gives the same centroids on every run and for every number of threads; devices agree
    up to the rounding of sums. Waits for the device once an iteration.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor; the latter is rounded to float32.
        num_clusters: 1 to 256, and no more than a block has vectors.
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
    checks.check_blocks("block_size", weight, block_size)
    checks.check_vectors("cluster_dim", cluster_dim, block_size)
    checks.check_num_clusters(num_clusters, block_size, cluster_dim)
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
    seeds = problem.seeds(num_clusters, restarts, generator)
    found = problem.iterate(seeds, max_iterations, tolerance)
    if restarts == 1:
        return found[0]
    best = torch.stack([problem.error(tried) for tried in found]).argmin(0)
    return found[best, torch.arange(found.size(1), device=found.device)]


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
        if weights is not None:
            mass = to_vectors(weights, self.block_size, dim).double().sum(2)
            self.mass = torch.where((mass > 0).any(1, keepdim=True), mass, 1.0).float()

    def seeds(self, clusters: int, tries: int, generator: torch.Generator) -> Tensor:
        """Centroids to begin with, float32 ``(tries, blocks, clusters, dim)``."""
        blocks, count, dim = self.vectors.shape
        device = self.weight.device
        candidates = 2 + int(math.log(clusters))
        looked_at = min(count, _SEEDS_PER_CLUSTER * clusters)
        together = max(1, _SEEDING // max(1, blocks * looked_at * candidates))
        found = []
        for first in range(0, tries, together):
            # From the CPU's generator, so that a seed means the same on every device.
            drawn = [
                (
                    torch.randperm(count, generator=generator)[:looked_at].sort().values,
                    torch.rand(clusters, blocks, candidates, generator=generator, dtype=torch.float64),
                )
                for _ in range(first, min(tries, first + together))
            ]
            chosen = torch.stack([places for places, _ in drawn]).to(device)
            draws = torch.stack([shares for _, shares in drawn], 1).flatten(1, 2).to(device)
            vectors = self.vectors[:, chosen].transpose(0, 1).reshape(-1, looked_at, dim).float()
            mass = vectors.new_ones(vectors.shape[:2])
            if self.mass is not None:
                mass = self.mass[:, chosen].transpose(0, 1).reshape(-1, looked_at)
            found.append(_seeds(vectors, mass, draws).reshape(-1, blocks, clusters, dim))
        return torch.cat(found)

    def iterate(self, centroids: Tensor, max_iterations: int, tolerance: float) -> Tensor:
        """Lloyd's iterations from ``centroids (tries, blocks, k, dim)``."""
        vectors = self.vectors.float().transpose(1, 2).contiguous()
        limit = (tolerance * float(self.weight.double().std(correction=0))) ** 2
        run: Tensor = implementation("lloyd")(vectors, self.mass, centroids, max_iterations, limit)
        return run

    def error(self, centroids: Tensor) -> Tensor:
        """Weighted sum of squared errors of each block, float64."""
        indices = implementation("palettize")(self.weight, centroids, self.block_size)
        back = implementation("lookup")(indices, centroids, self.block_size)
        squares = to_vectors((self.weight.float() - back).double().square(), self.block_size, self.dim).sum(2)
        return (squares if self.mass is None else squares * self.mass).sum(1)


def _seeds(vectors: Tensor, mass: Tensor, draws: Tensor) -> Tensor:
    """Vectors drawn one by one, by their mass times squared distance to those before.

    Of several candidates, the one that leaves the least error is taken.

    Args:
        vectors: float32 ``(blocks, n, dim)``.
        mass: float32 ``(blocks, n)``.
        draws: uniform in [0, 1), float64 ``(clusters, blocks, candidates)``.
    """
    dim = vectors.size(2)
    entries = vectors.transpose(1, 2).contiguous()
    nearest = torch.full_like(mass, torch.inf)
    chances = mass.double()
    seeds = []
    for draw in draws:
        total = chances.cumsum(1)
        place = torch.searchsorted(total, draw * total[:, -1:], right=True).clamp(max=vectors.size(1) - 1)
        picked = vectors.gather(1, place.unsqueeze(2).expand(-1, -1, dim))
        distance = torch.zeros_like(mass).unsqueeze(1)
        for entry in range(dim):
            distance = distance + (entries[:, entry, None] - picked[:, :, entry, None]).square()
        left = torch.minimum(nearest.unsqueeze(1), distance)
        best = (left * mass.unsqueeze(1)).sum(2, dtype=torch.float64).argmin(1)[:, None, None]
        seeds.append(picked.gather(1, best.expand(-1, -1, dim)))
        nearest = left.gather(1, best.expand(-1, -1, left.size(2)))[:, 0]
        chances = nearest.double() * mass
    return torch.cat(seeds, 1)
