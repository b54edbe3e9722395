"""Ranges of the blocks of sharded tensors, and fake quantization by parameters that each rank has whole."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

import coreai_kernels
from coreai_kernels import grid_shape
from coreai_opt._sharding.layout import of_blocks, part_of

Parameters = tuple[Tensor, Tensor | None, Tensor | None]

__all__ = ["local_parameters", "observe_range"]


def observe_range(tensor: Tensor, block_size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block of a sharded tensor, whole on each rank, as of the whole tensor.

    One all-reduce of three float32 values a block.

    Args:
        tensor: a DTensor, floating point.
        block_size: extent of a block along each axis of the whole tensor.

    Returns:
        As :func:`coreai_kernels.observe_range`: plain tensors.
    """
    part = part_of(tensor)
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # Minima without their sign, maxima, and whether there is a NaN: all of them are reduced by the greatest.
    ends = torch.full(
        (3, *grid_shape(part.shape, block_size)), -torch.inf, dtype=exact, device=part.local.device
    )
    if part.local.numel():
        size, blocks = part.pieces(block_size)
        low, high = (each.to(exact) for each in coreai_kernels.observe_range(part.local, block_size=size))
        found = torch.stack([-low, high, low.isnan().to(exact)]).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        ends = of_blocks(found, blocks, ends.shape[1:], "amax", -torch.inf)
    part.reduce_(ends, dist.ReduceOp.MAX)
    has_nan = ends[2] == 1
    low, high = (torch.where(has_nan, torch.nan, each + 0.0).to(tensor.dtype) for each in (-ends[0], ends[1]))
    return low, high


def local_parameters(
    tensor: Tensor, parameters: Parameters, block_size: tuple[int, ...]
) -> tuple[Tensor, Parameters, tuple[int, ...]]:
    """This rank's part of a sharded tensor, the parameters of its blocks, and their size.

    Args:
        tensor: a DTensor; gradients reach it.
        parameters: scale, and zero point or minimum, of the blocks of the whole tensor.
        block_size: extent of a block along each axis of the whole tensor.
    """
    part = part_of(tensor)
    local = cast(Tensor, tensor.to_local()).view(part.local.shape)  # type: ignore[attr-defined]
    if not part.local.numel():
        return local, parameters, block_size
    size, blocks = part.pieces(block_size)
    scale, zero_point, minval = parameters
    for axis, index in enumerate(blocks):
        scale = scale.index_select(axis, index)
        zero_point = None if zero_point is None else zero_point.index_select(axis, index)
        minval = None if minval is None else minval.index_select(axis, index)
    return local, (scale, zero_point, minval), size
