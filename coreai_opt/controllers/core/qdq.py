"""Simulators as ONNX's QuantizeLinear and DequantizeLinear."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt.controllers.core.layers import channel_axis_of

__all__ = [
    "SCALE",
    "ZERO_POINT",
    "QuantizeDequantize",
    "keep_parameters",
    "needs_4_bits",
    "put_on_weight",
    "quantize_dequantize",
    "take_parameters",
]

SCALE, ZERO_POINT = "weight_scale", "weight_zero_point"
"""Buffers, in a layer that is being exported, of its weight's parameters, in the shape of the grid. Those of
other attributes begin with the attribute's name."""

# ONNX's numbers of the types, and torch's of those that it has.
_UINT4, _INT4 = 21, 22
_TYPES: dict[tuple[int, bool], Any] = {
    (8, True): torch.int8,
    (8, False): torch.uint8,
    (4, True): _INT4,
    (4, False): _UINT4,
}


class QuantizeDequantize(nn.Module):
    """A pair of QuantizeLinear and DequantizeLinear.

    Widths that ONNX lacks become the next wider one, with values clipped to their own range first.

    Args:
        scale: one value, or one a channel.
        zero_point: as many, int32.
        low: least integer.
        high: greatest integer.
        axis: of the channels; None for a single scale.
        clips: whether tensors have values beyond the range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None, clips: bool = True
    ) -> None:
        super().__init__()
        signed = low < 0
        self.bits = 4 if (low >= -8 and high <= (7 if signed else 15)) else 8
        self.dtype = _TYPES[self.bits, signed]
        self.attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        shape = (-1,) if axis is not None else ()
        narrow = self.dtype if self.bits == 8 else torch.int32
        self.register_buffer("scale", scale.detach().float().clone().reshape(shape))
        self.register_buffer("zero_point", zero_point.detach().reshape(shape).to(narrow))
        full = high - low + 1 == 2**self.bits
        self.ends: tuple[float, float] | None = None
        if clips and not full:
            if scale.numel() != 1:
                raise ValueError("ONNX clips to one range: ranges of channels need 4 or 8 bits")
            step, offset = float(scale), float(zero_point)
            self.ends = ((low - offset) * step, (high - offset) * step)

    def forward(self, tensor: Tensor) -> Tensor:
        """The pair. Only for export: elsewhere the operators compute nothing."""
        symbolic = torch.onnx.ops.symbolic
        if self.ends is not None:
            tensor = tensor.clamp(*self.ends)
        zero_point = self.zero_point
        if self.bits == 4:  # torch has no tensors of this type: the constant becomes one in the graph
            attributes = {"to": self.dtype}
            zero_point = symbolic("Cast", (zero_point,), attributes, dtype=self.dtype, shape=zero_point.shape)
        q = symbolic(
            "QuantizeLinear",
            (tensor, self.scale, zero_point),
            self.attributes,
            dtype=self.dtype,
            shape=tensor.shape,
        )
        return symbolic(
            "DequantizeLinear",
            (q, self.scale, zero_point),
            self.attributes,
            dtype=tensor.dtype,
            shape=tensor.shape,
        )


def quantize_dequantize(
    simulator: Any, scale: Tensor, zero_point: Tensor | None, axis: int | None, clips: bool = True
) -> QuantizeDequantize:
    """The pair that does what a simulator does.

    Args:
        simulator: tells the integers.
        scale: of its range.
        zero_point: of its range; None for zeros.
        axis: of the channels; None for a single scale.
        clips: whether tensors have values beyond the range.
    """
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return QuantizeDequantize(
        scale, zero_point, int(simulator.quant_min), int(simulator.quant_max), axis, clips
    )


def needs_4_bits(model: nn.Module) -> bool:
    """Whether a pair in the model is of 4 bits."""
    return any(isinstance(module, QuantizeDequantize) and module.bits == 4 for module in model.modules())


def keep_parameters(model: nn.Module, attribute: str, scale: Tensor, zero_point: Tensor | None) -> None:
    """Put the parameters of a weight that is being exported into its layer, as buffers."""
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    model.register_buffer(f"{attribute}_scale", scale.detach().clone(), persistent=False)
    model.register_buffer(f"{attribute}_zero_point", zeros.detach().clone(), persistent=False)


def take_parameters(layer: nn.Module, attribute: str) -> tuple[Tensor, Tensor]:
    """The scale and zero point of :func:`keep_parameters`, which are taken away."""
    scale, zero_point = (getattr(layer, f"{attribute}_{part}") for part in ("scale", "zero_point"))
    delattr(layer, f"{attribute}_scale")
    delattr(layer, f"{attribute}_zero_point")
    return scale, zero_point


def put_on_weight(layer: nn.Module, attribute: str, simulator: Any) -> None:
    """Let a weight go through the pair of its :func:`keep_parameters`, which are taken away."""
    scale, zero_point = take_parameters(layer, attribute)
    axis = channel_axis_of(layer) if scale.numel() > 1 else None
    pair = quantize_dequantize(simulator, scale, zero_point, axis, clips=False)
    # unsafe: torch would run the pair to see what it returns.
    parametrize.register_parametrization(layer, attribute, pair, unsafe=True)
