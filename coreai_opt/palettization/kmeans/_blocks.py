"""How a weight is cut into blocks with a palette each, and a block into vectors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coreai_opt.palettization.spec.errors import (
    _IncompatibleClusterDimError,
    _IncompatibleGranularityError,
)
from coreai_opt.palettization.spec.granularity import PalettizationGranularity

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks:
    """The grid of blocks of a weight.

    Attributes:
        shape: the weight's shape.
        block_size: extent of a block along each axis.
        cluster_dim: length of a vector: consecutive entries of axis 0.
    """

    shape: tuple[int, ...]
    block_size: tuple[int, ...]
    cluster_dim: int

    @classmethod
    def of(cls, shape: torch.Size, granularity: PalettizationGranularity, cluster_dim: int) -> "Blocks":
        """The grid that a granularity gives a weight of that shape.

        Raises:
            _IncompatibleGranularityError: the granularity does not fit the shape.
            _IncompatibleClusterDimError: the vectors do not divide a block.
        """
        if not shape:
            raise _IncompatibleGranularityError("a weight without dimensions has no palette")
        blocks = granularity.get_blocks_to_cluster(torch.empty(shape, device="meta"))
        block_size = tuple(blocks[0].shape)
        if any(block.shape != blocks[0].shape for block in blocks):
            raise _IncompatibleGranularityError(
                f"{type(granularity).__name__} cuts shape {tuple(shape)} into blocks of different shapes"
            )
        if block_size[0] % cluster_dim:
            what = "the weight" if block_size[0] == shape[0] else "a group"
            raise _IncompatibleClusterDimError(
                f"the {block_size[0]} output channels of {what} are not divisible by "
                f"cluster_dim {cluster_dim} (shape {tuple(shape)})"
            )
        return cls(tuple(shape), block_size, cluster_dim)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many blocks there are along each axis."""
        return tuple(size // block for size, block in zip(self.shape, self.block_size, strict=True))

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return math.prod(self.grid)

    @property
    def lut_shape(self) -> tuple[int, int]:
        """The leading axes of a look-up table: blocks along the weight's first two axes."""
        return self.grid[0], self.count // self.grid[0]

    def vectors(self, weight: Tensor) -> Tensor:
        """The weight as ``[blocks, vectors, cluster_dim]``; vectors of length one in row-major order."""
        rank, (rows, columns) = len(self.shape), self._block_matrix
        interleaved = [extent for pair in zip(self.grid, self.block_size, strict=True) for extent in pair]
        blocks = weight.reshape(interleaved).permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
        matrices = blocks.reshape(self.count, rows, columns)
        if self.cluster_dim > 1:
            matrices = matrices.transpose(1, 2)
        return matrices.reshape(self.count, -1, self.cluster_dim)

    def weight(self, vectors: Tensor) -> Tensor:
        """The weight whose :meth:`vectors` these are."""
        rank, (rows, columns) = len(self.shape), self._block_matrix
        if self.cluster_dim > 1:
            matrices = vectors.reshape(self.count, columns, rows).transpose(1, 2)
        else:
            matrices = vectors.reshape(self.count, rows, columns)
        order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
        return matrices.reshape(*self.grid, *self.block_size).permute(order).reshape(self.shape)

    def indices(self, labels: Tensor) -> Tensor:
        """Values ``[blocks, vectors]``, one for each of :meth:`vectors`, where that is in the weight."""
        dim = self.cluster_dim
        shape, block_size = ((each[0] // dim, *each[1:]) for each in (self.shape, self.block_size))
        if dim > 1:
            # Vectors come column by column.
            labels = labels.reshape(self.count, -1, block_size[0]).transpose(1, 2)
        return Blocks(shape, block_size, 1).weight(labels)

    @property
    def _block_matrix(self) -> tuple[int, int]:
        return self.block_size[0], math.prod(self.block_size[1:])
