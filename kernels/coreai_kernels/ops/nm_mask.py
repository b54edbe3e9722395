"""``nm_mask``: N:M sparsity, the largest n of every m neighbours."""

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference.nm_mask import nm_mask as reference
from coreai_kernels.triton import registry as triton

__all__ = ["nm_mask"]

LARGEST_GROUP = 32

define(
    "nm_mask",
    "(Tensor weight, int n, int m, int axis) -> Tensor",
    reference=reference,
    fake=lambda weight, n, m, axis: torch.empty_like(weight),
    triton=triton.get("nm_mask"),
)


def nm_mask(weight: Tensor, n: int, m: int, axis: int = -1) -> Tensor:
    """Mask that keeps the ``n`` largest magnitudes of every ``m`` consecutive elements along ``axis``.

    Ties, zeros, subnormals and NaN rank as in :func:`coreai_kernels.topk_mask`; of equal magnitudes the lower
    index along the axis is kept first. Not differentiable.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of any shape and strides; may be empty.
        n: elements kept in each group, at least 1.
        m: elements in a group, more than ``n`` and at most 32; must divide the axis.
        axis: axis along which the groups lie; negative values count from the end.

    Returns:
        Ones and zeros in the weight's shape, dtype and memory format.

    Raises:
        ValueError: ``n`` and ``m`` are out of range, or ``m`` does not divide the axis.
        IndexError: ``weight`` has no such axis.
        TypeError: ``weight`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    if not 1 <= n < m <= LARGEST_GROUP:
        raise ValueError(f"n and m must satisfy 1 <= n < m <= {LARGEST_GROUP}; got n = {n}, m = {m}")
    axis = checks.check_axis(weight, axis)
    if weight.size(axis) % m:
        raise ValueError(
            f"m = {m} does not divide axis {axis} of shape {tuple(weight.shape)}: "
            "every group must have m elements"
        )
    return implementation("nm_mask")(weight.detach(), n, m, axis)  # type: ignore[no-any-return]
