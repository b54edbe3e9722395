"""Lloyd's iterations: centroids to the means of the vectors that are nearest to them, until they rest.

At first centroids move beyond the means, by :data:`STRIDE` times the way to them (Lee, Baek & Sung, IEEE
Signal Processing Letters 1997). That takes fewer iterations, and ends in better minima. Once it gains no
more, they move to the means.

The vectors of a block come in parts of :data:`PART`, and those of a part in :data:`LANES` lanes, the i-th in
lane ``i % LANES``. Sums over the vectors of a cluster are float64: over each lane in order, then over the
lanes, then over the parts. So they do not depend on the number of threads.
"""

import torch
from torch import Tensor

from coreai_kernels.reference.palettize import palettize

__all__ = ["LANES", "PART", "STRIDE", "lloyd"]

LANES, PART, STRIDE = 8, 1 << 15, 1.6


def lloyd(
    vectors: Tensor,
    mass: Tensor | None,
    centroids: Tensor,
    center: Tensor,
    total: Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids after the iterations from those given, in each of several tries for every block.

    Where ``S_j`` and ``M_j`` are the sum and the mass of the vectors of cluster ``j``, the squared error
    around the means is ``total - sum_j |S_j - M_j center|^2 / M_j``. The block of a try
    goes to the means once an iteration lowers that by no more than its share ``tolerance``; and ends at the
    next such iteration, or after ``max_iterations``. A centroid that loses all its vectors stays where it is.

    Args:
        vectors: float32 ``(blocks, dim, n)``: the entries of a vector lie below each other.
        mass: importance of each vector, float32 ``(blocks, n)``; None where all weigh the same.
        centroids: those to begin with, float32 ``(tries, blocks, k, dim)``.
        center: a point in each block, float64 ``(blocks, dim)``. The nearer to the mean, the less rounding.
        total: sum of mass times squared distance to it, float64 ``(blocks,)``.
        max_iterations: at most so many.
        tolerance: a share of the squared error.

    Returns:
        The centroids; the mass of the vectors of each, as they were last assigned, float64 ``(tries, blocks,
        k)``; and the sum of mass times squared difference to the centroid, for each entry of the vectors,
        float64 ``(tries, blocks, k, dim)``.
    """
    results = [
        _one_try(vectors, mass, tried, center, total, max_iterations, tolerance)
        for tried in centroids.unbind(0)
    ]
    if not results:
        double = centroids.double()
        return centroids.clone(), double[..., 0].clone(), double
    found, masses, spread = (torch.stack(parts) for parts in zip(*results, strict=True))
    return found, masses, spread


def _one_try(
    vectors: Tensor,
    mass: Tensor | None,
    centroids: Tensor,
    center: Tensor,
    total: Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks, dim, count = vectors.shape
    clusters, data = centroids.size(1), vectors.reshape(blocks * dim, count)
    points = vectors.transpose(1, 2).double()
    weight = torch.ones_like(points[:, :, 0]) if mass is None else mass.double()
    moving = torch.ones(blocks, dtype=torch.bool, device=vectors.device)
    strides = moving
    indices = palettize(data, centroids, (dim, count)).long()
    masses = _sums(weight, indices, clusters)
    last = torch.full_like(total, -torch.inf)
    settled = centroids
    for iteration in range(max_iterations):
        if iteration:
            nearest = palettize(data, centroids, (dim, count)).long()
            indices = torch.where(moving[:, None], nearest, indices)
            masses = _sums(weight, indices, clusters)
        sums = torch.stack([_sums(points[:, :, e] * weight, indices, clusters) for e in range(dim)], 2)
        filled = masses > 0
        around = sums - masses[:, :, None] * center[:, None]
        parts = torch.where(filled[:, :, None], around * around / masses[:, :, None], 0.0)
        gain = parts.flatten(1).cumsum(1)[:, -1]
        before = centroids.double()
        means = torch.where(filled[:, :, None], sums / masses[:, :, None], before)
        settled = torch.where(moving[:, None, None], means.float(), settled)
        gains = gain - last > tolerance * (total - gain).clamp(min=0)
        moving, strides = moving & (gains | strides), strides & gains
        beyond = torch.where(filled[:, :, None], before + STRIDE * (means - before), before)
        centroids = torch.where(strides[:, None, None], beyond, means).float()
        last = gain
        if not moving.any():
            break
    owner = indices[:, :, None].expand(-1, -1, dim)
    apart = points - settled.double().gather(1, owner)
    squares = apart * apart * weight[:, :, None]
    spread = torch.stack([_sums(squares[:, :, entry], indices, clusters) for entry in range(dim)], 2)
    return settled, masses, spread


def _sums(values: Tensor, indices: Tensor, clusters: int) -> Tensor:
    """Sums of ``values (blocks, n)`` over each cluster: float64 ``(blocks, clusters)``."""
    blocks, count = values.shape
    parts = max(1, -(-count // PART))
    position = torch.arange(count, device=values.device)
    place = (position // PART * clusters + indices) * LANES + position % LANES
    place = place + torch.arange(blocks, device=values.device)[:, None] * (parts * clusters * LANES)
    sums = values.new_zeros(blocks * parts * clusters * LANES)
    sums.index_add_(0, place.reshape(-1), values.reshape(-1))
    lanes = sums.reshape(blocks, parts, clusters, LANES).cumsum(3)[..., -1]
    return lanes.cumsum(1)[:, -1]
