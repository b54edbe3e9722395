"""``palettize``: the index of the nearest centroid, for each weight."""

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import palettize as reference
from coreai_kernels.triton import registry as triton

__all__ = ["palettize"]


def _fake(weight: Tensor, centroids: Tensor, block_size: list[int]) -> Tensor:
    dim = centroids.size(2)
    if dim == 1:
        return torch.empty_like(weight, dtype=torch.uint8)
    return weight.new_empty((weight.size(0) // dim, *weight.shape[1:]), dtype=torch.uint8)


define(
    "palettize",
    "(Tensor weight, Tensor centroids, int[] block_size) -> Tensor",
    reference=reference.palettize,
    fake=_fake,
    triton=triton.get("palettize"),
)


def palettize(weight: Tensor, centroids: Tensor, *, block_size: tuple[int, ...]) -> Tensor:
    """Indices of the nearest centroids.

    Scalars are compared exactly, with the midpoints between centroids; vectors by their squared distance,
    summed in float32. Ties go to the lower index. NaN goes to the smallest of scalar centroids; a vector with
    NaN, to index 0.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of any strides; the latter is rounded to float32.
        centroids: ``(blocks, k, dim)``, at most 256 a block, in any order; a vector is ``dim`` consecutive
            entries of axis 0.
        block_size: extent of a block of ``weight`` along each axis; ``dim`` must divide the first.

    Returns:
        uint8 tensor of the shape of ``weight``, its first axis divided by ``dim``. For scalars in the memory
        format of ``weight``, for vectors contiguous. No gradient.

    Raises:
        ValueError: shapes do not fit.
        TypeError: ``weight`` or ``centroids`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    checks.check_centroids(centroids, weight.shape, block_size)
    return implementation("palettize")(  # type: ignore[no-any-return]
        weight.detach(), centroids.detach(), block_size
    )
