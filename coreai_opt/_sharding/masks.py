"""Masks of sharded tensors: the functions of :mod:`coreai_kernels` of these names, for DTensors.

Each gives the mask of the whole tensor, bit for bit, as a DTensor that is placed as the weight is. The weight
stays where it is. All ranks have to call them together.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import coreai_kernels
from coreai_kernels import grid_shape
from coreai_kernels.ops import checks
from coreai_kernels.reference.layout import per_block, split_blocks
from coreai_opt._sharding import selecting
from coreai_opt._sharding.layout import Part, is_sharded, of_blocks, part_of, whole, with_local

__all__ = ["block_mask", "channel_mask", "nm_mask", "topk_mask", "whole_mask"]


def whole_mask(mask: Tensor) -> Tensor:
    """A mask, whole on each rank: one byte an element is sent."""
    return whole(mask.bool()).to(mask.dtype) if is_sharded(mask) else mask


def topk_mask(weight: Tensor, num_keep: int) -> Tensor:
    """See :func:`coreai_kernels.topk_mask`."""
    (local,) = selecting.topk_masks([([weight], num_keep)])[0]
    return with_local(weight, local)


@torch.no_grad()
def nm_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """See :func:`coreai_kernels.nm_mask`. Of groups that lie on several ranks, the elements are exchanged."""
    if weight.size(axis) % m:
        raise ValueError(f"m = {m} does not divide axis {axis} of shape {tuple(weight.shape)}")
    part = part_of(weight)
    cuts = _groups_cut(weight, m, axis)
    if cuts is None:
        mask = coreai_kernels.nm_mask(whole(weight.detach()), n, m, axis)
        return with_local(weight, part.cut(mask).contiguous())
    local = part.local
    begin, end = part.offset[axis], part.offset[axis] + local.size(axis)
    mask = torch.zeros_like(local)
    first, last = -(-begin // m) * m, end // m * m
    if last > first and local.numel():
        inner = local.narrow(axis, first - begin, last - first)
        mask.narrow(axis, first - begin, last - first).copy_(coreai_kernels.nm_mask(inner, n, m, axis))
    if cuts:
        shape = [*local.shape]
        shape[axis] = len(cuts) * m
        dtype = torch.promote_types(local.dtype, torch.float32)
        shared = local.new_zeros(shape, dtype=dtype)
        places = []
        for index, group in enumerate(cuts):
            start, stop = max(begin, group * m), min(end, (group + 1) * m)
            if stop > start:
                places.append((index * m + start - group * m, start - begin, stop - start))
        for there, here, size in places:
            shared.narrow(axis, there, size).copy_(local.narrow(axis, here, size))
        dist.all_reduce(shared, group=_group_of_axis(weight, axis))
        chosen = coreai_kernels.nm_mask(shared, n, m, axis)
        for there, here, size in places:
            mask.narrow(axis, here, size).copy_(chosen.narrow(axis, there, size))
    return with_local(weight, mask)


def block_mask(weight: Tensor, num_keep: int, block_size: tuple[int, ...]) -> Tensor:
    """See :func:`coreai_kernels.block_mask`."""
    block_size = tuple(
        size if block == -1 else block for size, block in zip(weight.shape, block_size, strict=True)
    )
    checks.check_blocks("block_size", weight, block_size)
    part = part_of(weight)
    chosen = coreai_kernels.topk_mask(_block_norms(part, block_size), num_keep)
    mask = chosen.to(weight.dtype)
    for axis, block in enumerate(block_size):
        index = torch.arange(part.local.size(axis), device=mask.device) + part.offset[axis]
        mask = mask.index_select(axis, index // block)
    return with_local(weight, mask)


def channel_mask(weight: Tensor, num_keep: int, axis: int, expanded: bool = False) -> Tensor:
    """See :func:`coreai_kernels.channel_mask`; ``expanded`` makes no difference."""
    block_size = [*weight.shape]
    block_size[axis] = 1
    return block_mask(weight, num_keep, tuple(block_size))


def _group_of_axis(weight: Tensor, axis: int) -> Any:
    sharded = cast(Any, weight)
    (index,) = (i for i, each in enumerate(sharded.placements) if each.is_shard(axis))
    return sharded.device_mesh.get_group(index)


def _groups_cut(weight: Tensor, m: int, axis: int) -> list[int] | None:
    """The groups of ``m`` along an axis that lie on several ranks; None if that is not known."""
    sharded = cast(Any, weight)
    placements = list(enumerate(sharded.placements))
    cut_by = [index for index, each in placements if not each.is_replicate() and each.dim == axis]
    size = weight.size(axis)
    ranks = 1
    for index in cut_by:
        ranks *= sharded.device_mesh.size(index)
    if size % (m * ranks) == 0:
        return []
    if len(cut_by) > 1 or not sharded.placements[cut_by[0]].is_shard(axis):
        return None
    share = -(-size // ranks)
    return sorted({border // m for border in range(share, size, share) if border % m})


@torch.no_grad()
def _block_norms(part: Part, block_size: tuple[int, ...]) -> Tensor:
    """What :func:`coreai_kernels.reference.block_mask.block_norms` gives for the whole tensor."""
    grid = grid_shape(part.shape, block_size)
    device = part.local.device
    peaks = torch.zeros(grid, dtype=torch.int64, device=device)
    if part.local.numel():
        size, blocks = part.pieces(block_size)
        values = part.local.double().abs()
        pieces, axes = split_blocks(values, size)
        # As bits, which compare like the values, and NaN is the greatest.
        largest = torch.iinfo(torch.int64).max
        of_pieces = pieces.view(torch.int64).masked_fill(pieces.isnan(), largest).amax(axes)
        peaks = of_blocks(of_pieces, blocks, grid, "amax")
    part.reduce_(peaks, dist.ReduceOp.MAX)
    peak = peaks.view(torch.float64)
    unit = (((peaks >> 52) + 1).div(4, rounding_mode="floor") * 4 + 3 - 28).clamp_min(1) << 52
    units = unit.view(torch.float64)
    finite = peak.isfinite()
    counts = torch.zeros(grid, dtype=torch.int64, device=device)
    if part.local.numel():
        unit_here, finite_here = units, finite
        for axis, index in enumerate(blocks):
            unit_here = unit_here.index_select(axis, index)
            finite_here = finite_here.index_select(axis, index)
        spread = per_block(unit_here, values, size)
        is_finite = per_block(finite_here, values, size)
        counted = torch.round(torch.where(is_finite, values, 0.0) / spread).long()
        pieces, axes = split_blocks(counted, size)
        counts = of_blocks(pieces.sum(axes), blocks, grid, "sum")
    part.reduce_(counts, dist.ReduceOp.SUM)
    return torch.where(finite, counts.double() * units, peak)
