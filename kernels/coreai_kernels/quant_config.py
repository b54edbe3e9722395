"""The settings of a fake quantizer, as every part of the engine takes them."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.types import RangeUpdate

__all__ = ["QuantConfig", "taking_config", "taking_packed_config"]


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How a tensor is observed and quantized, whatever its values. All kinds are plain integers.

    Attributes:
        block_size: extent of a block along each axis; for a list of tensors those of all, in order.
        scheme: a :class:`coreai_kernels.Scheme`.
        format: a :class:`coreai_kernels.Format`.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        use_minval: min-value formulation instead of zero point. Integers only.
        update: a :class:`coreai_kernels.RangeUpdate`.
        averaging_constant: weight of the batch in a moving average.
        range_min: a fixed lower bound of the range, None to observe it.
        range_max: a fixed upper bound.
        scale_format: a :class:`coreai_kernels.ScaleFormat`.
    """

    block_size: tuple[int, ...]
    scheme: int
    format: int
    quant_min: float
    quant_max: float
    use_minval: bool = False
    update: int = int(RangeUpdate.LATEST)
    averaging_constant: float = 0.01
    range_min: float | None = None
    range_max: float | None = None
    scale_format: int = int(ScaleFormat.FLOAT32)

    # The fields as arguments of an operator, in the order of `arguments`; lists say "SymInt[] block_sizes".
    # Symbolic sizes let a program that torch compiled serve any length.
    SCHEMA = (
        "SymInt[] block_size, int scheme, int format, float quant_min, float quant_max, bool use_minval, "
        "int update, float averaging_constant, float? range_min, float? range_max, int scale_format"
    )

    def arguments(self) -> tuple[Any, ...]:
        """The fields in order."""
        return (
            self.block_size,
            self.scheme,
            self.format,
            self.quant_min,
            self.quant_max,
            self.use_minval,
            self.update,
            self.averaging_constant,
            self.range_min,
            self.range_max,
            self.scale_format,
        )

    def with_block_size(self, block_size: tuple[int, ...]) -> "QuantConfig":
        """The same for other blocks."""
        return QuantConfig(block_size, *self.arguments()[1:])

    def parameters(self, zero_point: Tensor, minval: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Zero point and minimum, those that the formulation uses; None in the place of the other."""
        if self.format != Format.INT:
            return None, None
        return (None, minval) if self.use_minval else (zero_point, None)

    def packed(self) -> Tensor:
        """The fields as the in-place operator takes them: the block's extents come last, in float64.

        Each argument of an operator costs its caller a fraction of a microsecond; a tensor no more than a
        number. ``csrc/ops/quant_config.h`` reads them.
        """
        block_size, *others = self.arguments()
        values = [math.nan if value is None else float(value) for value in others]
        # By way of numpy: no mode that is active here, a fake tensor's for one, is to get hold of it.
        return torch.from_numpy(np.array([*values, *block_size], dtype=np.float64))

    @classmethod
    def unpacked(cls, packed: Tensor) -> "QuantConfig":
        """Inverse of :meth:`packed`."""
        values = packed.tolist()
        scheme, fmt, low, high, use_minval, update, constant, *bounds, scale_format = values[:_PACKED]
        range_min, range_max = (None if math.isnan(bound) else bound for bound in bounds)
        return cls(
            block_size=tuple(int(extent) for extent in values[_PACKED:]),
            scheme=int(scheme),
            format=int(fmt),
            quant_min=low,
            quant_max=high,
            use_minval=bool(use_minval),
            update=int(update),
            averaging_constant=constant,
            range_min=range_min,
            range_max=range_max,
            scale_format=int(scale_format),
        )


_FIELDS = len(QuantConfig.SCHEMA.split(","))
_PACKED = _FIELDS - 1  # numbers before the block's extents


def taking_config(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(*tensors, config, with_mask)`` as one that takes the fields as an operator's arguments."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        *tensors, with_mask = args
        block_size, *others = tensors[-_FIELDS:]
        config = QuantConfig(tuple(block_size), *others)
        return function(*tensors[:-_FIELDS], config, with_mask)

    return call


def taking_packed_config(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(*tensors, config, with_mask)`` as one that takes the configuration packed."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        *tensors, packed, with_mask = args
        return function(*tensors, QuantConfig.unpacked(packed), with_mask)

    return call
