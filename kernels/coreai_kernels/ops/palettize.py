"""``palettize``: the index of the nearest centroid, for each weight."""

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import palettize as reference
from coreai_kernels.triton import registry as triton

__all__ = ["palettize"]


def _fake(weight: Tensor, centroids: Tensor, block_size: list[int], decimals: int | None = None) -> Tensor:
    dim = centroids.size(2)
    if dim == 1:
        return torch.empty_like(weight, dtype=torch.uint8)
    return weight.new_empty((weight.size(0) // dim, *weight.shape[1:]), dtype=torch.uint8)


define(
    "palettize",
    "(Tensor weight, Tensor centroids, int[] block_size, int? decimals=None) -> Tensor",
    reference=reference.palettize,
    fake=_fake,
    triton=triton.get("palettize"),
)


def palettize(
    weight: Tensor, centroids: Tensor, *, block_size: tuple[int, ...], decimals: int | None = None
) -> Tensor:
    """Indices of the nearest centroids.

    Scalars are compared exactly, with the midpoints between centroids; vectors by their squared distance,
    summed in float32. Ties go to the lower index. NaN goes to the smallest of scalar centroids; a vector with
    NaN, to index 0.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of any strides; the latter is rounded to float32.
        centroids: ``(blocks, k, dim)``, at most 256 a block, in any order; a vector is ``dim`` consecutive
            entries of axis 0.
        block_size: extent of a block of ``weight`` along each axis; ``dim`` must divide the first.
        decimals: compare scalars rounded to so many decimal places, as :func:`coreai_kernels.kmeans_1d`
            rounds them. It costs nothing: what is moved is the bounds between the centroids.

    Returns:
        uint8 tensor of the shape of ``weight``, its first axis divided by ``dim``. For scalars in the memory
        format of ``weight``, for vectors contiguous. No gradient.

    Raises:
        ValueError: shapes do not fit; ``decimals`` out of range, or for vectors.
        TypeError: ``weight`` or ``centroids`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    checks.check_centroids(centroids, weight.shape, block_size)
    checks.check_decimals(decimals)
    if decimals is not None and centroids.size(2) > 1:
        raise ValueError(f"decimals are for scalars; got centroids of {centroids.size(2)} entries")
    return implementation("palettize")(  # type: ignore[no-any-return]
        weight.detach(), centroids.detach(), block_size, decimals
    )
