"""Exact k-means of scalars by dynamic programming.

After Wang & Song (R Journal 2011) and Grønlund et al. (arXiv 1701.07204).

Clusters of an optimal partition are runs of the sorted distinct values. With ``S`` and ``W`` the prefix sums
of mass times value (less the mean of all) and of mass, the squared error is a constant less the gain
``sum (S_b - S_a)^2 / (W_b - W_a)`` over the runs ``a..b``. The best gain of the first ``i`` values in ``j``
runs is::

    G_j[i] = max over m of G_{j-1}[m] + (S_i - S_m)^2 / (W_i - W_m)

The best ``m`` never decreases with ``i``: halving the range of ``i`` halves that of ``m``, and a row takes
O(n log n). All sums are float64, from the lowest value up. Of equal gains the smallest ``m`` wins.
"""

import torch
from torch import Tensor

from coreai_kernels.reference.layout import to_vectors

__all__ = ["kmeans_1d", "round_decimals"]


def round_decimals(x: Tensor, decimals: int) -> Tensor:
    """Float32 values rounded as ``numpy.round`` does: by a product and a quotient, each rounded."""
    power = x.new_full((), 10.0**decimals)  # a tensor: GPUs multiply by the inverse of a number
    return torch.round(x * power) / power


def kmeans_1d(
    weight: Tensor,
    weights: Tensor | None,
    block_size: tuple[int, ...],
    num_clusters: int,
    decimals: int | None,
) -> Tensor:
    """Centroids, float32 ``(blocks, num_clusters, 1)``, ascending in each block.

    A block with fewer distinct values than clusters has each of them, and repeats the largest. One whose
    ``weights`` are all zero counts as unweighted. A block with NaN or an infinity, or with a negative or
    non-finite weight, has NaN centroids. ``weights`` of bool leave elements out, whatever they are.
    """
    values = to_vectors(weight, block_size)[:, :, 0].float()
    if decimals is not None:
        values = round_decimals(values, decimals)
    masses = None if weights is None else to_vectors(weights, block_size)[:, :, 0]
    result = torch.empty(values.size(0), num_clusters, 1, device=weight.device)
    for block in range(values.size(0)):
        inside, mass = values[block], None if masses is None else masses[block]
        if mass is not None and mass.dtype == torch.bool:
            inside, mass = inside[mass] if bool(mass.any()) else inside, None
        result[block, :, 0] = _centroids(inside, None if mass is None else mass.double(), num_clusters)
    return result


def _centroids(values: Tensor, mass: Tensor | None, num_clusters: int) -> Tensor:
    valid = values.isfinite().all()
    if mass is not None:
        valid = valid & mass.isfinite().all() & (mass >= 0).all()
    if not valid:
        return torch.full((num_clusters,), torch.nan)
    points, mass = _distinct(values, mass)
    if len(points) <= num_clusters:
        return torch.cat([points, points[-1:].expand(num_clusters - len(points))]).float()
    ends = _partition(points, mass, num_clusters)
    means = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        inside = mass[start:end]
        means.append((points[start:end] * inside).cumsum(0)[-1] / inside.cumsum(0)[-1])
    return torch.stack(means).float()


def _distinct(values: Tensor, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distinct values in ascending order and the mass of each, float64; those without mass are left out."""
    points, place, counts = values.unique(return_inverse=True, return_counts=True)
    points, total = points.double() + 0.0, counts.double()
    if mass is not None and bool((mass > 0).any()):
        total = torch.zeros_like(points).index_add_(0, place, mass)
        points, total = points[total > 0], total[total > 0]
    return points, total


def _partition(points: Tensor, mass: Tensor, num_clusters: int) -> list[int]:
    """End of each run of the best partition of more points than clusters."""
    mean = (points * mass).cumsum(0)[-1] / mass.cumsum(0)[-1]
    zero = points.new_zeros(1)
    sums = torch.cat([zero, ((points - mean) * mass).cumsum(0)])
    masses = torch.cat([zero, mass.cumsum(0)])
    count = len(points)
    gain = torch.cat([zero, sums[1:] * sums[1:] / masses[1:]])
    rows = []
    for clusters in range(2, num_clusters + 1):
        first = count if clusters == num_clusters else clusters
        gain, splits = _best_splits(gain, sums, masses, clusters, first)
        rows.append(splits)
    ends = [count]
    for splits in reversed(rows):
        ends.insert(0, int(splits[ends[0]]))
    return ends


def _best_splits(
    gain: Tensor, sums: Tensor, masses: Tensor, clusters: int, first: int
) -> tuple[Tensor, Tensor]:
    """Gain and last split of the first ``i`` values, ``i >= first``: all halves of a level at once."""
    count = len(sums) - 1
    best = torch.full_like(gain, -torch.inf)
    splits = torch.zeros(count + 1, dtype=torch.int64, device=gain.device)
    # Open ranges of i, and of the m that come into question.
    low, high, least, most = (
        torch.tensor([x], device=gain.device) for x in (first, count, clusters - 1, count - 1)
    )
    while len(low):
        middle = (low + high) // 2
        sizes = torch.minimum(most, middle - 1) - least + 1
        node = torch.repeat_interleave(sizes)
        m = torch.arange(len(node), device=gain.device) - (sizes.cumsum(0) - sizes - least)[node]
        i = middle[node]
        run = sums[i] - sums[m]
        candidates = gain[m] + run * run / (masses[i] - masses[m])
        top = torch.full_like(middle, 0, dtype=gain.dtype).scatter_reduce(0, node, candidates, "amax")
        m = torch.where(candidates == top[node], m, count)
        chosen = torch.full_like(middle, count).scatter_reduce(0, node, m, "amin")
        best[middle], splits[middle] = top, chosen
        low, high = torch.cat([low, middle + 1]), torch.cat([middle - 1, high])
        least, most = torch.cat([least, chosen]), torch.cat([chosen, most])
        keep = low <= high
        low, high, least, most = low[keep], high[keep], least[keep], most[keep]
    return best, splits
