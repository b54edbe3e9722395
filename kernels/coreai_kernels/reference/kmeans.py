"""Lloyd's iterations: centroids to the means of the vectors that are nearest to them, until they rest."""

from collections.abc import Callable

import torch
from torch import Tensor

from coreai_kernels.reference.lookup import lookup_backward
from coreai_kernels.reference.palettize import palettize

__all__ = ["lloyd"]


def lloyd(
    vectors: Tensor,
    mass: Tensor | None,
    centroids: Tensor,
    max_iterations: int,
    limit: float,
    assign: Callable[..., Tensor] = palettize,
    segment_sum: Callable[..., Tensor] = lookup_backward,
) -> Tensor:
    """Centroids, float32 ``(tries, blocks, k, dim)``, after the iterations from those of that shape.

    The block of a try ends once no centroid of it moves by a square of more than ``limit``, or after
    ``max_iterations``. A centroid that loses all its vectors stays where it is.

    Args:
        vectors: float32 ``(blocks, dim, n)``: the entries of a vector lie below each other.
        mass: importance of each vector, float32 ``(blocks, n)``; None where all weigh the same.
        centroids: those to begin with.
        max_iterations: at most so many.
        limit: a squared distance, as float32.
        assign: as :func:`~coreai_kernels.reference.palettize.palettize`.
        segment_sum: as :func:`~coreai_kernels.reference.lookup.lookup_backward`.
    """
    blocks, dim, count = vectors.shape
    clusters, rows, row_block = centroids.size(2), (blocks * dim, count), (dim, count)
    data = vectors.reshape(rows)
    weighted = data if mass is None else (vectors * mass.unsqueeze(1)).reshape(rows)
    masses = vectors.new_ones(blocks, count) if mass is None else mass
    found = []
    for tried in centroids.unbind(0):
        moving = torch.ones((blocks, 1, 1), dtype=torch.bool, device=vectors.device)
        for _ in range(max_iterations):
            indices = assign(data, tried, row_block)
            sums = segment_sum(weighted, indices, row_block, clusters, dim)
            totals = segment_sum(masses, indices, (1, count), clusters, 1)
            moved = torch.where(moving & (totals > 0), sums / totals, tried)
            squares = (moved - tried).square()
            shift = squares[:, :, 0]
            for entry in range(1, dim):
                shift = shift + squares[:, :, entry]
            tried = moved
            moving = moving & (shift.amax(1) > limit)[:, None, None]
            if not moving.any():
                break
        found.append(tried)
    return torch.stack(found)
