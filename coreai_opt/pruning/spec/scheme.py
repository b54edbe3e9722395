"""Which elements of a tensor are pruned together."""

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

import coreai_kernels
from coreai_opt._sharding import masks as masks_of_sharded
from coreai_opt._sharding.layout import is_sharded
from coreai_opt._utils.registry_utils import RegisteredConfig
from coreai_opt._utils.tensor_utils import normalize_axis

__all__ = ["BlockStructured", "ChannelStructured", "NMStructured", "PruningScheme", "Unstructured"]


def kept_of(count: int, sparsity: float) -> int:
    """How many of ``count`` stay: the number that is pruned is rounded down."""
    return count - int(count * sparsity)


def _functions_for(weight: Tensor) -> Any:
    return masks_of_sharded if is_sharded(weight) else coreai_kernels


class PruningScheme(RegisteredConfig):
    """Base of the schemes, by itself the unstructured one.

    A subclass registered under a key can be named in a specification as ``{"type": key, ...}``. Where it
    prunes by another rule than its base, it overrides :meth:`magnitude_mask`.
    """

    axis: int | None = None

    def magnitude_mask(self, weight: Tensor, sparsity: float) -> Tensor:
        """1 for what stays and 0 for what is pruned, by magnitude; in the shape and dtype of ``weight``.

        Args:
            weight: floating-point tensor. Of equal magnitudes those with the lowest index stay; NaN ranks
                highest.
            sparsity: fraction to prune, in [0, 1]; the number of pruned elements is rounded down.

        Raises:
            ValueError: the scheme does not fit the shape.
            TypeError: ``weight`` is not floating point.
        """
        return _functions_for(weight).topk_mask(weight, kept_of(weight.numel(), sparsity))


@PruningScheme.register("unstructured")
class Unstructured(PruningScheme):
    """Every element by itself."""

    axis: Literal[None] = None


@PruningScheme.register("channel_structured")
class ChannelStructured(PruningScheme):
    """Whole slices along ``axis``, from the end if negative, ranked by the sum of their magnitudes."""

    axis: int = 0

    def magnitude_mask(self, weight: Tensor, sparsity: float) -> Tensor:
        """See the base; the number of pruned slices is rounded down. A view of one value a slice."""
        axis = normalize_axis(self.axis, weight.ndim)
        kept = kept_of(weight.shape[axis], sparsity)
        return _functions_for(weight).channel_mask(weight, kept, axis, expanded=True)


@PruningScheme.register("n_m_structured")
class NMStructured(PruningScheme):
    """Of every ``m`` consecutive elements along ``axis``, the ``n`` largest stay.

    At a sparsity below ``1 - n / m``, as on a schedule's way there, more of them stay; at 0 all.

    Raises:
        pydantic.ValidationError: not ``1 <= n < m <= 32``.
    """

    axis: int = -1
    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, le=32)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"n must be less than m, for {self.n} of every {self.m} elements to stay")
        return self

    @property
    def sparsity(self) -> float:
        """The fraction that the whole pattern prunes."""
        return (self.m - self.n) / self.m

    def magnitude_mask(self, weight: Tensor, sparsity: float) -> Tensor:
        """See the base; the number of pruned elements in a group is rounded to the nearest."""
        axis = normalize_axis(self.axis, weight.ndim)
        kept = max(self.n, self.m - round(self.m * sparsity))
        if kept < self.m:
            return _functions_for(weight).nm_mask(weight, kept, self.m, axis)
        if weight.shape[axis] % self.m:
            raise ValueError(f"axis {axis} of shape {tuple(weight.shape)} does not divide by m = {self.m}")
        return torch.ones_like(weight)


@PruningScheme.register("block_structured")
class BlockStructured(PruningScheme):
    """Whole blocks, ranked by the sum of their magnitudes.

    Fields:
        block_size: a block's extent along each axis, -1 for the whole axis; it must divide the shape.
    """

    axis: Literal[None] = None
    block_size: tuple[int, ...]

    @field_validator("block_size")
    @classmethod
    def _check_block_size(cls, block_size: tuple[int, ...]) -> tuple[int, ...]:
        if not block_size or any(each < 1 and each != -1 for each in block_size):
            raise ValueError(f"block_size must hold positive sizes, or -1 for a whole axis; got {block_size}")
        return block_size

    def magnitude_mask(self, weight: Tensor, sparsity: float) -> Tensor:
        """See the base; the number of pruned blocks is rounded down."""
        if len(self.block_size) != weight.ndim:
            raise ValueError(
                f"block_size must have one entry per axis, {weight.ndim} for shape {tuple(weight.shape)}; "
                f"got {self.block_size}"
            )
        blocks = math.prod(
            1 if block == -1 else size // block
            for size, block in zip(weight.shape, self.block_size, strict=True)
        )
        return _functions_for(weight).block_mask(weight, kept_of(blocks, sparsity), self.block_size)
