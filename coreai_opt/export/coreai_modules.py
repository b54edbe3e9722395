"""Modules of a model for Core AI: they call the operators that the converter knows.

Buffers are persistent, and named so that the converter finds them: ``indices`` and ``lut`` for palettes. The
operators belong to the package coreai-torch and have no derivatives: such a model is for inference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.export.parametrized import FinalizedWeight

__all__ = [
    "ActivationDequantize",
    "ActivationQuantize",
    "DequantizedWeight",
    "PalettizedWeight",
    "SparsePalettizedWeight",
    "SparseWeight",
]


def _operators() -> Any:
    return torch.ops.coreai


class _WithBuffers(nn.Module):
    """A module with these buffers."""

    def __init__(self, **buffers: Tensor | None) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        """The buffers' dtypes and shapes."""
        found = ((name, tensor) for name, tensor in self._buffers.items() if tensor is not None)
        return ", ".join(f"{name}={tensor.dtype} {tuple(tensor.shape)}" for name, tensor in found)


class DequantizedWeight(_WithBuffers, FinalizedWeight):
    """Blockwise quantized values."""

    def __init__(
        self,
        quantized_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        minval: Tensor | None,
        input_dtype: torch.dtype | None,
        output_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(quantized_data=quantized_data, scale=scale, zero_point=zero_point, minval=minval)
        self.input_dtype = input_dtype
        self.output_dtype = output_dtype

    def forward(self, _: Tensor | None = None) -> Tensor:
        """The weight, in ``output_dtype`` or that of the scale."""
        result: Tensor = _operators().constexpr_blockwise_shift_scale(
            self.quantized_data, self.scale, self.zero_point, self.minval, self.input_dtype, self.output_dtype
        )
        return result


class PalettizedWeight(_WithBuffers, FinalizedWeight):
    """Look-up tables, quantized or not, and a scale of each channel or not."""

    def __init__(
        self, indices: Tensor, lut: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        super().__init__(indices=indices, lut=lut, scale=scale, zero_point=zero_point)

    def forward(self, _: Tensor | None = None) -> Tensor:
        """The weight, in the dtype of the scale or else of the table."""
        dense: Tensor = _operators().lut_to_dense(self.indices, self.lut, 0)
        return _scaled(dense, self)


class SparseWeight(_WithBuffers, FinalizedWeight):
    """The elements that are stored, in row-major order, and where they are."""

    def __init__(self, nonzero_data: Tensor, mask: Tensor) -> None:
        super().__init__(nonzero_data=nonzero_data, mask=mask)

    def forward(self, _: Tensor | None = None) -> Tensor:
        """The weight, with zeros where nothing is stored."""
        result: Tensor = _operators().sparse_to_dense(self.nonzero_data, self.mask)
        return result


class SparsePalettizedWeight(_WithBuffers, FinalizedWeight):
    """Indices of the elements that are stored, into a table for each equal part of them."""

    def __init__(self, nonzero_indices: Tensor, lut: Tensor, mask: Tensor, scale: Tensor | None) -> None:
        super().__init__(nonzero_indices=nonzero_indices, lut=lut, mask=mask, scale=scale)

    def forward(self, _: Tensor | None = None) -> Tensor:
        """The weight, with zeros where nothing is stored."""
        values = _operators().lut_to_dense(self.nonzero_indices, self.lut, 0)
        return _scaled(_operators().sparse_to_dense(values, self.mask), self)


def _scaled(dense: Tensor, module: nn.Module) -> Tensor:
    scale: Any = module._buffers["scale"]
    if scale is None:
        return dense
    zero_point = module._buffers.get("zero_point")
    result: Tensor = _operators().constexpr_blockwise_shift_scale(dense, scale, zero_point, None, None, None)
    return result


class ActivationQuantize(_WithBuffers):
    """The first half of a quantized activation."""

    def __init__(
        self,
        scale: Tensor,
        output_dtype: torch.dtype,
        zero_point: Tensor | None,
        minval: Tensor | None,
        axis: int,
        lowest: Tensor | None = None,
        highest: Tensor | None = None,
    ) -> None:
        super().__init__(scale=scale, zero_point=zero_point, minval=minval, lowest=lowest, highest=highest)
        self.output_dtype = output_dtype
        self.axis = axis

    def forward(self, tensor: Tensor) -> Tensor:
        """Quantized values of ``tensor``, which is clamped first if the buffers say so."""
        for name, clamp in (("lowest", torch.maximum), ("highest", torch.minimum)):
            limit = self._buffers[name]
            if limit is not None:
                shape = [1] * tensor.dim()
                shape[self.axis] = limit.numel()
                tensor = clamp(tensor, torch.reshape(limit, shape))
        result: Tensor = _operators().quantize(
            tensor, self.scale, self.output_dtype, self.zero_point, self.minval, self.axis
        )
        return result


class ActivationDequantize(_WithBuffers):
    """The second half of a quantized activation."""

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor | None,
        minval: Tensor | None,
        axis: int,
        input_dtype: torch.dtype | None,
        output_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(scale=scale, zero_point=zero_point, minval=minval)
        self.axis = axis
        self.input_dtype = input_dtype
        self.output_dtype = output_dtype

    def forward(self, tensor: Tensor) -> Tensor:
        """Values that the quantized ``tensor`` stands for."""
        result: Tensor = _operators().dequantize(
            tensor, self.scale, self.zero_point, self.minval, self.axis, self.input_dtype, self.output_dtype
        )
        return result
