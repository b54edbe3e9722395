"""The range of values in each block of a tensor."""

from abc import abstractmethod
from typing import Any

import torch

import coreai_kernels
from coreai_opt._sharding.layout import is_sharded
from coreai_opt._sharding.ranges import observe_range as observe_sharded_range
from coreai_opt._utils.registry_utils import ClassRegistryMixin
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec._generation import HasGeneration
from coreai_opt.quantization.spec.granularity import QuantizationGranularity

__all__ = ["MinMaxRangeCalculator", "RangeCalculatorBase"]


class RangeCalculatorBase(ClassRegistryMixin, HasGeneration):
    """Computes the range that quantization has to cover, block by block.

    A subclass implements ``_generate_min_max``, and is named in a specification by its key in this registry.
    """

    def __init__(
        self,
        granularity: QuantizationGranularity,
        quantization_target: CompressionTargetTensor = CompressionTargetTensor.WEIGHT,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.granularity = granularity
        self.quantization_target = quantization_target

    # An estimator may depend on how values are quantized; most ranges do not.
    def set_spec(self, spec: Any) -> None:
        """Tell the calculator which specification it serves. Called once, when it is made from one."""

    def get_block_size(self, tensor_shape: torch.Size) -> tuple[int, ...]:
        """Extent of a block along each axis of a tensor of that shape; ValueError if none fits."""
        return self.granularity.get_block_size(tensor_shape, self.quantization_target)

    def _reshape_min_max(self, range_tensor: torch.Tensor, input_shape: torch.Size) -> torch.Tensor:
        block_size = self.get_block_size(input_shape)
        grid = [size // block if block else 1 for size, block in zip(input_shape, block_size, strict=True)]
        return range_tensor.reshape(grid)

    @abstractmethod
    def _generate_min_max(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper ends of the blocks' ranges, one value a block, in the blocks' order."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper ends of the ranges, each of shape ``x.shape[i] / block_size[i]``.

        Raises:
            ValueError: the granularity does not fit the shape.
            IndexError: a block is empty.
            NotImplementedError: the tensor is sharded, and this is no calculator for minimum and maximum.
        """
        if is_sharded(x) and not isinstance(self, MinMaxRangeCalculator):
            raise NotImplementedError(
                f"{type(self).__name__} needs whole tensors, and this one is sharded: use the range "
                f"calculator 'minmax' under tensor parallelism"
            )
        min_val, max_val = self._generate_min_max(x)
        return self._reshape_min_max(min_val, x.shape), self._reshape_min_max(max_val, x.shape)


@RangeCalculatorBase.register("minmax")
class MinMaxRangeCalculator(RangeCalculatorBase):
    """The range from the smallest to the largest element. NaN if a block holds one."""

    def _generate_min_max(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block_size = self.get_block_size(tensor.shape)
        if 0 in block_size:
            raise IndexError(f"the tensor is empty: shape {tuple(tensor.shape)} has no minimum and maximum")
        if is_sharded(tensor):
            return observe_sharded_range(tensor, block_size)
        return coreai_kernels.observe_range(tensor, block_size=block_size)
