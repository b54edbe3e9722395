"""What a compressed tensor is, without the simulator that it came from: what every target is written from."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Affine", "Palette", "QuantizedActivation", "Sparse", "WeightRecord", "int_min"]


@dataclass(frozen=True)
class Affine:
    """Quantized values, and the parameters that they are dequantized with.

    Attributes:
        values: integers one a byte, float8 values, or 4-bit floating point (e2m1) two a byte: uint8, the last
            axis halved, the first of two in the low half.
        scale: as many values along each axis as there are blocks; the dtype of the weight, float8_e8m0fnu, or
            float8_e4m3fn with ``scale_of_tensor``.
        zero_point: in the dtype of ``values`` and the shape of ``scale``; None with ``minval``, or for
            floating-point values.
        minval: value of the smallest integer of ``dtype``, in the dtype and shape of ``scale``; or None.
        dtype: what the values are: torch.int4, torch.float8_e4m3fn, ...
        output_dtype: the dtype of the weight.
        scale_of_tensor: one number, float32, by which all of ``scale`` are divided; None for 1.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    minval: Tensor | None
    dtype: torch.dtype
    output_dtype: torch.dtype
    scale_of_tensor: Tensor | None = None


@dataclass(frozen=True)
class Palette:
    """Indices into look-up tables.

    Attributes:
        indices: uint8, the shape of the weight with axis 0 divided by the length of the tables' vectors.
        lut: ``[blocks along each axis, 2 ** n_bits, length of a vector]``, quantized if there is a scale.
        lut_scale: one value a table, as many along each axis of the weight as there are tables; or None.
        lut_zero_point: in the dtype of ``lut`` and the shape of ``lut_scale``; or None.
        channel_scale: ``[channels, 1, ...]``: what the looked-up values of each channel are multiplied with.
        mask: True where the weight is stored; the others are 0. None if all are.
        dequantized_lut: ``lut`` in the dtype of the weight.
    """

    indices: Tensor
    lut: Tensor
    lut_scale: Tensor | None
    lut_zero_point: Tensor | None
    channel_scale: Tensor | None
    mask: Tensor | None
    dequantized_lut: Tensor

    @property
    def n_bits(self) -> int:
        """Bits of an index."""
        return (self.lut.shape[-2] - 1).bit_length()

    @property
    def cluster_dim(self) -> int:
        """Length of the vectors that an index stands for."""
        return self.lut.shape[-1]


@dataclass(frozen=True)
class Sparse:
    """A weight of which some elements are stored.

    Attributes:
        weight: the weight; what its elements are where the mask is False does not matter.
        mask: bool, of the weight's shape.
    """

    weight: Tensor
    mask: Tensor


WeightRecord = Affine | Palette | Sparse


@dataclass(frozen=True)
class QuantizedActivation:
    """How an activation is quantized and dequantized.

    Attributes:
        scale: one value, or one a channel.
        zero_point: in the dtype of the quantized values; None with ``minval`` or for floating point.
        minval: see :class:`Affine`.
        dtype: what the quantized values are.
        output_dtype: the dtype of the activation.
        axis: of the channels; None for a single scale.
        lowest, highest: the activation is clamped to these first, as its quantized values have a narrower
            range than their dtype; shaped as the scale, None for no limit.
    """

    scale: Tensor
    zero_point: Tensor | None
    minval: Tensor | None
    dtype: torch.dtype
    output_dtype: torch.dtype
    axis: int | None
    lowest: Tensor | None = None
    highest: Tensor | None = None


def int_min(dtype: torch.dtype) -> int:
    """The smallest integer of ``dtype``, which may have fewer than 8 bits."""
    name = str(dtype).removeprefix("torch.")
    return 0 if name.startswith("uint") else -(1 << (int(name.removeprefix("int")) - 1))
