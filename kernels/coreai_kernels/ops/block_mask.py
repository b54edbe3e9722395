"""``block_mask`` and ``channel_mask``: keep the blocks, or the slices along an axis, of largest L1 norm."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import block_mask as reference
from coreai_kernels.triton import registry as triton
from coreai_kernels.types import grid_shape

__all__ = ["block_mask", "channel_mask"]

define(
    "block_mask",
    "(Tensor weight, int num_keep, int[] block_size) -> Tensor",
    reference=reference.block_mask,
    fake=lambda weight, num_keep, block_size: torch.empty_like(weight),
    triton=triton.get("block_mask"),
)
define(
    "top_blocks",
    "(Tensor weight, int num_keep, int[] block_size) -> Tensor",
    reference=reference.top_blocks,
    fake=lambda weight, num_keep, block_size: weight.new_empty(grid_shape(weight.shape, tuple(block_size))),
    triton=triton.get("top_blocks"),
)


def block_mask(weight: Tensor, num_keep: int, block_size: Sequence[int]) -> Tensor:
    """Mask that keeps exactly ``num_keep`` blocks: those of largest L1 norm.

    The norms are exact sums of magnitudes that were rounded to a unit, of which the block's largest magnitude
    has at least 2**24 (:func:`coreai_kernels.reference.block_mask.block_norms`). So they do not depend on the
    order of the additions: all backends, thread counts and memory formats give the same mask. Norms that
    differ by more than ``n / 2**24`` times the largest of ``n`` magnitudes are told apart. Of equal norms the
    lowest block index in row-major order is kept first. A block with a NaN ranks above one with an infinity,
    and both above all others. Not differentiable.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of any shape and strides; may be empty.
        num_keep: number of blocks of ones, 0 to the number of blocks.
        block_size: extent of a block along each axis, -1 for the whole axis; must divide the shape.

    Returns:
        Ones and zeros in the weight's shape, dtype and memory format.

    Raises:
        ValueError: the blocks do not tile the weight, or ``num_keep`` is out of range.
        TypeError: ``weight`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    if len(block_size) == weight.dim():
        # A block of an empty axis is one element long: there are none of them.
        block_size = tuple(
            max(1, size) if block == -1 else block
            for size, block in zip(weight.shape, block_size, strict=True)
        )
    grid = checks.check_blocks("block_size", weight, tuple(block_size))
    checks.check_num_keep(num_keep, math.prod(grid), "blocks")
    return implementation("block_mask")(weight.detach(), num_keep, tuple(block_size))  # type: ignore[no-any-return]


def channel_mask(weight: Tensor, num_keep: int, axis: int = 0, *, expanded: bool = False) -> Tensor:
    """Mask that keeps exactly ``num_keep`` slices along ``axis``: those of largest L1 norm.

    :func:`block_mask` with blocks that are one wide along ``axis`` and whole along all others.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of at least one axis, of any strides.
        num_keep: number of slices of ones, 0 to ``weight.size(axis)``.
        axis: axis that the slices are numbered along; negative values count from the end.
        expanded: give a view of one value a slice, with stride 0 along the other axes. Nothing of the
            weight's size is written then.

    Returns:
        Ones and zeros in the weight's shape and dtype, and unless ``expanded`` in its memory format.

    Raises:
        ValueError: ``num_keep`` is out of range.
        IndexError: ``weight`` has no such axis.
        TypeError: ``weight`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    axis = checks.check_axis(weight, axis)
    checks.check_num_keep(num_keep, weight.size(axis), "slices")
    if weight.numel() == 0:
        return torch.empty_like(weight)
    block_size = tuple(1 if i == axis else size for i, size in enumerate(weight.shape))
    if expanded:
        chosen = implementation("top_blocks")(weight.detach(), num_keep, block_size)
        return chosen.expand(weight.shape)  # type: ignore[no-any-return]
    return implementation("block_mask")(weight.detach(), num_keep, block_size)  # type: ignore[no-any-return]
