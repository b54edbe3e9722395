"""Which elements of a tensor share quantization parameters."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from coreai_opt._utils.registry_utils import RegisteredConfig
from coreai_opt._utils.tensor_utils import normalize_axis
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec.errors import _BlockSizeMismatchError

__all__ = [
    "PerBlockGranularity",
    "PerChannelGranularity",
    "PerTensorGranularity",
    "QuantizationGranularity",
    "resolve_block_sizes",
]

_WEIGHT = CompressionTargetTensor.WEIGHT
_PositiveInt = Annotated[int, Field(gt=0)]


def resolve_block_sizes(tensor_shape: Sequence[int], block_sizes: Sequence[int]) -> list[int]:
    """One block size per axis, with -1 replaced by the axis' size.

    Args:
        tensor_shape: the tensor's shape.
        block_sizes: one entry per axis: a positive divisor of the axis' size, or -1 for the whole axis.

    Raises:
        ValueError: the ranks differ, an entry is neither positive nor -1, or it does not divide the axis.
    """
    if len(block_sizes) != len(tensor_shape):
        raise ValueError(
            f"block_size must have one entry per dimension, {len(tensor_shape)} for shape "
            f"{tuple(tensor_shape)}; got {tuple(block_sizes)}"
        )
    resolved = []
    for axis, (size, block) in enumerate(zip(tensor_shape, block_sizes, strict=True)):
        if block == -1:
            resolved.append(size)
            continue
        if block < 1:
            raise ValueError(f"block_size[{axis}] must be positive or -1 for the whole axis, got {block}")
        if size % block:
            raise _BlockSizeMismatchError(
                f"size {size} of axis {axis} is not divisible by its block size {block} "
                f"(shape {tuple(tensor_shape)}, block_size {tuple(block_sizes)})"
            )
        resolved.append(block)
    return resolved


class QuantizationGranularity(RegisteredConfig):
    """Base of the granularities. A granularity cuts a tensor into equal blocks, each with its own parameters.

    A subclass implements ``_get_block_size(shape, target)``; registered under a key, it can be named in a
    specification as ``{"type": key, ...}``.
    """

    axis: int | None = None

    @abstractmethod
    def _get_block_size(
        self, block_sizes_list: list[int], quantization_target: CompressionTargetTensor = _WEIGHT
    ) -> list[int]:
        """Block sizes, given the tensor's shape as a list that may be changed."""

    def get_block_size(
        self, tensor_shape: torch.Size, quantization_target: CompressionTargetTensor = _WEIGHT
    ) -> tuple[int, ...]:
        """Extent of a block along each axis of a tensor.

        Args:
            tensor_shape: the tensor's shape.
            quantization_target: the tensor's role.

        Raises:
            ValueError: the granularity does not fit the shape.
        """
        return tuple(self._get_block_size(list(tensor_shape), quantization_target))


@QuantizationGranularity.register("per_tensor")
class PerTensorGranularity(QuantizationGranularity):
    """One block: the whole tensor."""

    axis: Literal[None] = None

    def _get_block_size(
        self, block_sizes_list: list[int], quantization_target: CompressionTargetTensor = _WEIGHT
    ) -> list[int]:
        return block_sizes_list


@QuantizationGranularity.register("per_channel")
class PerChannelGranularity(QuantizationGranularity):
    """One block for each index along ``axis``, which may count from the end."""

    def _get_block_size(
        self, block_sizes_list: list[int], quantization_target: CompressionTargetTensor = _WEIGHT
    ) -> list[int]:
        if self.axis is None:
            raise ValueError(
                "PerChannelGranularity() without an axis leaves it to whoever knows the operation; "
                "here nobody does: give one, e.g. PerChannelGranularity(axis=0)"
            )
        block_sizes_list[normalize_axis(self.axis, len(block_sizes_list))] = 1
        return block_sizes_list


@QuantizationGranularity.register("per_block")
class PerBlockGranularity(QuantizationGranularity):
    """Blocks of ``block_size`` elements along ``axis``, or of any shape.

    With an int, the blocks of an activation have extent one along the other axes. Those of a weight have
    extent one along the first two axes, its output and input channels, and span the axes after them.
    With a tuple, one entry per axis, -1 spans the axis; ``axis`` must be None then.
    """

    block_size: _PositiveInt | tuple[_PositiveInt | Literal[-1], ...]

    def _get_block_size(
        self, block_sizes_list: list[int], quantization_target: CompressionTargetTensor = _WEIGHT
    ) -> list[int]:
        if isinstance(self.block_size, int):
            return self._along_one_axis(self.block_size, block_sizes_list, quantization_target)
        if self.axis is not None:
            raise ValueError(
                f"axis must be None when block_size is a tuple, which has an entry for each axis; "
                f"got axis={self.axis}, block_size={self.block_size}"
            )
        return resolve_block_sizes(block_sizes_list, self.block_size)

    def _along_one_axis(
        self, block_size: int, shape: list[int], quantization_target: CompressionTargetTensor
    ) -> list[int]:
        if self.axis is None:
            raise ValueError(
                f"block_size={self.block_size} needs an axis; or give a tuple, one entry per dimension"
            )
        axis = normalize_axis(self.axis, len(shape))
        if shape[axis] % block_size:
            raise _BlockSizeMismatchError(
                f"size {shape[axis]} of axis {axis} is not divisible by the block size {block_size}"
            )
        unit_axes = len(shape) if quantization_target == CompressionTargetTensor.ACTIVATION else 2
        resolved = [1] * min(unit_axes, len(shape)) + shape[unit_axes:]
        resolved[axis] = block_size
        return resolved
