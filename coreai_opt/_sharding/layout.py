"""Which part of a sharded tensor this rank holds, and how the ranks that hold the others are reached."""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coreai_kernels.imports import once_imported

__all__ = [
    "Part",
    "is_fully_sharded",
    "is_sharded",
    "of_blocks",
    "part_of",
    "refuse",
    "whole",
    "with_local",
    "with_sums",
    "with_whole",
]


# torch.distributed.tensor, which takes a while to import. Where nobody has, nothing is a DTensor.
_dtensor: Any = None


def _take(module: Any) -> None:
    global _dtensor
    _dtensor = module


once_imported("torch.distributed.tensor", _take)


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor: of FSDP2, of tensor parallelism, or of a user's own."""
    return _dtensor is not None and isinstance(tensor, _dtensor.DTensor)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 exchanges the module's parameters around its forward."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # slow to import; without it nothing is sharded so
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one whose shards lie on several ranks; gradients go to the shards.

    All ranks have to ask for one together.
    """
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def refuse(model: nn.Module, what: str) -> None:
    """RuntimeError if parameters of the model are sharded, for ``what`` changes its modules."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise RuntimeError(
            f"{what} needs whole parameters, and those of this model are sharded: create the compressed "
            f"model anew, without sharding it, load the full state dict into it, and use that"
        )


class Part(NamedTuple):
    """What this rank holds of a sharded tensor.

    Attributes:
        local: the elements; detached.
        shape: of the whole tensor.
        offset: where ``local`` begins in the whole tensor, along each axis.
        groups: process groups, one for each axis of the mesh along which the tensor is cut. Ranks that differ
            along another axis of the mesh hold the same elements.
    """

    local: Tensor
    shape: torch.Size
    offset: tuple[int, ...]
    groups: tuple[Any, ...]

    def reduce_(self, value: Tensor, op: Any) -> Tensor:
        """``value`` over the ranks that hold other parts, in place."""
        for group in self.groups:
            dist.all_reduce(value, op, group)
        return value

    def cut(self, value: Tensor) -> Tensor:
        """The part of a tensor of the whole shape that lies where this one does; a view."""
        for axis, (start, size) in enumerate(zip(self.offset, self.local.shape, strict=True)):
            value = value.narrow(axis, start, size)
        return value

    def pieces(self, block_size: Sequence[int]) -> tuple[tuple[int, ...], list[Tensor]]:
        """Blocks that no border between ranks cuts.

        Args:
            block_size: of blocks of the whole tensor.

        Returns:
            The largest size that divides the blocks and fits the borders of this part, and, along each axis,
            the number of the block that each piece of this part belongs to.
        """
        sizes, blocks = [], []
        for block, start, size in zip(block_size, self.offset, self.local.shape, strict=True):
            piece = math.gcd(block, start, size)
            starts = torch.arange(start, start + size, piece, device=self.local.device)
            sizes.append(piece)
            blocks.append(starts // block)
        return tuple(sizes), blocks


def of_blocks(
    pieces: Tensor, blocks: Sequence[Tensor], grid: Sequence[int], reduce: str, start: float = 0
) -> Tensor:
    """One value for each block of the whole tensor, from those of the pieces that are here.

    Args:
        pieces: one value a piece, the last axes of which are those of ``blocks``.
        blocks: the number of the block of each piece, as :meth:`Part.pieces` gives them.
        grid: how many blocks there are along each axis.
        reduce: ``amax`` or ``sum``.
        start: what it begins with, and what blocks get of which there are no pieces.
    """
    first = pieces.ndim - len(blocks)
    for axis, (index, count) in enumerate(zip(blocks, grid, strict=True), start=first):
        shape = [*pieces.shape]
        shape[axis] = count
        index = index.reshape([-1] + [1] * (pieces.ndim - 1 - axis)).expand_as(pieces)
        pieces = pieces.new_full(shape, start).scatter_reduce_(axis, index, pieces, reduce)
    return pieces


def part_of(tensor: Tensor) -> Part:
    """What this rank holds of ``tensor``, a DTensor.

    Raises:
        ValueError: sums are pending on it.
    """
    sharded = cast(Any, tensor)
    mesh, placements = sharded.device_mesh, sharded.placements
    if any(each.is_partial() for each in placements):
        raise ValueError(f"the tensor is a sum that is pending ({placements}): redistribute it first")
    shape, offset = _dtensor._utils.compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    local = sharded._local_tensor.detach()
    if local.shape != shape:  # an empty part may have forgotten its other axes
        local = local.reshape(shape)
    cut = [index for index, each in enumerate(placements) if not each.is_replicate()]
    groups = tuple(mesh.get_group(index) for index in cut if mesh.size(index) > 1)
    return Part(local, tensor.shape, tuple(offset), groups)


def with_sums(tensor: Tensor) -> Tensor:
    """A DTensor on which no sums are pending: the tensor, or what comes of adding up."""
    sharded = cast(Any, tensor)
    if not any(each.is_partial() for each in sharded.placements):
        return tensor
    done = [_dtensor.Replicate() if each.is_partial() else each for each in sharded.placements]
    return sharded.redistribute(sharded.device_mesh, done)  # type: ignore[no-any-return]


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """A DTensor placed as ``tensor`` is, of which this rank holds ``local``; gradients pass."""
    like = cast(Any, tensor)
    return _dtensor.DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def with_whole(tensor: Tensor, value: Tensor) -> Tensor:
    """A DTensor placed as ``tensor`` is, of a value that each rank has whole; gradients reach it whole."""
    like = cast(Any, tensor)
    replicated = _dtensor.DTensor.from_local(
        value, like.device_mesh, [_dtensor.Replicate()] * like.device_mesh.ndim, run_check=False
    )
    return replicated.redistribute(like.device_mesh, like.placements)
