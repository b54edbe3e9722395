"""``kmeans_1d``: the optimal palette of scalars."""

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import kmeans_1d as reference
from coreai_kernels.types import grid_shape

__all__ = ["kmeans_1d"]


def _fake(
    weight: Tensor, weights: Tensor | None, block_size: list[int], num_clusters: int, decimals: int | None
) -> Tensor:
    blocks = torch.Size(grid_shape(weight.shape, tuple(block_size))).numel()
    return weight.new_empty((blocks, num_clusters, 1), dtype=torch.float32)


define(
    "kmeans_1d",
    "(Tensor weight, Tensor? weights, int[] block_size, int num_clusters, int? decimals) -> Tensor",
    reference=reference.kmeans_1d,
    fake=_fake,
)


def kmeans_1d(
    weight: Tensor,
    num_clusters: int,
    *,
    block_size: tuple[int, ...],
    weights: Tensor | None = None,
    decimals: int | None = None,
) -> Tensor:
    """Centroids with the least sum of squared errors, for each block of a tensor.

    Solved exactly, by dynamic programming over the sorted distinct values (Wang & Song, R Journal 2011;
    Grønlund et al., arXiv 1701.07204), with sums in float64: the partition is optimal to 1e-11 of the values'
    variance. Of several optimal ones that with the earliest splits is taken. 16-bit types cost a histogram of
    their bit patterns, however large the tensor.

    Runs on the CPU, wherever ``weight`` is, and waits for the result: clustering happens once, or on a
    schedule, and not in a training step.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor; the latter is rounded to float32.
        num_clusters: 1 to 256, and no more than a block has elements.
        block_size: extent of a block along each axis; must divide the shape.
        weights: importance of each element, at least 0, in the shape of ``weight``; or bool, which elements
            count: the others may have any value. A block of which all are 0 counts as unweighted.
        decimals: cluster the values rounded to so many decimal places, as :func:`numpy.round` rounds float32.

    Returns:
        float32 ``(blocks, num_clusters, 1)`` on the device of ``weight``; blocks in row-major order,
        ascending within each. With fewer distinct values than clusters, the largest repeats.

    Raises:
        ValueError: shapes do not fit; a block has fewer elements than ``num_clusters``; NaN or an infinity in
            ``weight`` or ``weights``, or a negative one in ``weights``.
        TypeError: ``weight`` is not floating point, or ``weights`` neither that nor bool.
    """
    checks.check_float_input("weight", weight)
    checks.check_blocks("block_size", weight, block_size)
    checks.check_num_clusters(num_clusters, block_size)
    if weights is not None:
        if weights.dtype != torch.bool:
            checks.check_float_input("weights", weights)
        if weights.shape != weight.shape:
            raise ValueError(
                f"weights must have the shape of weight, {tuple(weight.shape)}; got {tuple(weights.shape)}"
            )
        weights = weights.detach().cpu()
    checks.check_decimals(decimals)
    centroids: Tensor = implementation("kmeans_1d")(
        weight.detach().cpu(), weights, block_size, num_clusters, decimals
    )
    if centroids.isnan().any():
        block = int(centroids.isnan().any(dim=(1, 2)).nonzero()[0])
        raise ValueError(
            f"block {block} of {centroids.size(0)}: weight must be finite"
            + (" and weights finite and at least 0" if weights is not None else "")
            + (f", also when rounded to {decimals} decimals" if decimals is not None else "")
        )
    return centroids.to(weight.device)
