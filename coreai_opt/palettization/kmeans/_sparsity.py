"""Pruned weights: which of their values palettes are for, and in which order vectors of them are stored."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coreai_opt.palettization.kmeans._blocks import Blocks

__all__ = ["DENSE", "Sparsity", "counts_of", "find_sparsity", "gathered", "scattered"]


class Sparsity(NamedTuple):
    """The zeros of a weight that stay zero.

    Attributes:
        mask: False for these, bool of the weight's shape. None if the weight is not pruned.
        positions: for palettes of vectors, places in the flattened weight of the values that each block
            stores, ascending: int32 (int64 where that is too narrow) ``(blocks, stored)``.
        reserving: for palettes of scalars, which blocks keep the entry 0 for the value zero, bool
            ``(blocks,)``. None where none does.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    reserving: Tensor | None = None


DENSE = Sparsity()


def find_sparsity(weight: Tensor, threshold: float, blocks: Blocks, cluster_dim: int) -> Sparsity:
    """What is kept of a weight in which a share of ``threshold`` or more is zero. Waits for the device.

    Groups of output channels are stored with equally many values each: those that keep fewer than the
    fullest store zeros, too. So palettes of scalars have an entry for zero there; and of vectors, a group
    leaves out its smallest values until vectors divide the rest, and then stores its first zeros.

    Raises:
        ValueError: vectors, where blocks are no groups along axis 0; or a group has too few zeros; or the
            weight is not finite.
    """
    mask = weight.bool()  # in less than half the time of a comparison with zero
    zeros = mask.numel() - sum(counts_of(mask.reshape(1, -1)))
    if zeros == 0 or zeros < threshold * mask.numel():
        return DENSE
    grouped = blocks.grid[0] == blocks.count
    if cluster_dim == 1:
        if not grouped or blocks.count == 1:
            return Sparsity(mask)
        counts = counts_of(mask.reshape(blocks.count, -1))
        reserving = torch.tensor([count < max(counts) for count in counts], device=weight.device)
        return Sparsity(mask, reserving=reserving if min(counts) < max(counts) else None)
    if not grouped:
        raise ValueError(
            f"of a pruned weight, vectors (cluster_dim {cluster_dim}) lie in the whole weight or in "
            f"groups along axis 0; got blocks {blocks.block_size} of shape {blocks.shape}"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite; got NaN or an infinity")
    stored = _stored(weight.reshape(blocks.count, -1), cluster_dim)
    if not bool(stored.any()):
        return DENSE
    small = stored.numel() <= torch.iinfo(torch.int32).max
    positions = stored.reshape(-1).nonzero()[:, 0].to(torch.int32 if small else torch.int64)
    return Sparsity(stored.reshape(weight.shape), positions=positions.reshape(blocks.count, -1))


def counts_of(rows: Tensor) -> list[int]:
    """How many are true in each row of a bool matrix. Waits for the device."""
    if rows.device.type != "cpu":
        return rows.sum(1).tolist()  # type: ignore[no-any-return]
    # In a fraction of the time that torch takes.
    return [int(np.count_nonzero(row)) for row in rows.numpy()]


def _stored(groups: Tensor, dim: int) -> Tensor:
    """Which values of ``groups (groups, values)`` are stored: equally many in each, divisible by ``dim``."""
    kept = groups != 0
    for group, inside in zip(groups, kept, strict=True):
        places = inside.nonzero()[:, 0]
        surplus = len(places) % dim
        if surplus:
            # Of equal ones those that torch sorts first, as in Apple's package: else checkpoints do not fit.
            inside[places[group[places].abs().argsort()[:surplus]]] = False
    counts = kept.sum(1)
    missing = counts.max() - counts
    zeros = groups == 0
    rank = zeros.cumsum(1)
    short = missing > rank[:, -1]
    if bool(short.any()):
        group = int(short.nonzero()[0])
        raise ValueError(
            f"group {group} must store {int(counts.max())} values, as the fullest does, but keeps "
            f"{int(counts[group])} and has {int(rank[group, -1])} zeros"
        )
    return kept | (zeros & (rank <= missing[:, None]))


def gathered(weight: Tensor, positions: Tensor, dim: int) -> Tensor:
    """The stored vectors as columns: ``(blocks * dim, vectors)``, where ``(dim, vectors)`` is a block."""
    stored = weight.reshape(-1)[positions]
    columns = stored.reshape(len(positions), -1, dim).transpose(1, 2)
    return columns.reshape(len(positions) * dim, -1)


def scattered(columns: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight whose :func:`gathered` vectors these are, with zeros in all other places."""
    stored = columns.reshape(len(positions), -1, columns.shape[1]).transpose(1, 2).reshape(-1)
    flat = stored.new_zeros(torch.Size(shape).numel()).index_put((positions.reshape(-1),), stored)
    return flat.reshape(shape)
