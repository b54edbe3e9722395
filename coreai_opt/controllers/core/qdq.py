"""Simulators as ONNX's QuantizeLinear and DequantizeLinear."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt.controllers.core.layers import INPUT, channel_axis_of

__all__ = [
    "FIRST_OPSET_OF_4_BITS",
    "SCALE",
    "ZERO_POINT",
    "QuantizeDequantize",
    "install_qdq",
    "needs_4_bits",
]

SCALE, ZERO_POINT = "weight_scale", "weight_zero_point"
"""Buffers, in a layer that is being exported, of its weight's parameters, in the shape of the grid."""

FIRST_OPSET_OF_4_BITS = 21
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

    Args:
        scale: one value, or one a channel.
        zero_point: as many, int32.
        bits: 4 or 8.
        signed: whether the integers are.
        axis: of the channels; None for a single scale.

    Raises:
        ValueError: ONNX has no integers of so many bits.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int, signed: bool, axis: int | None) -> None:
        super().__init__()
        if (bits, signed) not in _TYPES:
            raise ValueError(f"ONNX quantizes to 4 and 8 bits; a tensor is quantized to {bits}")
        self.bits = bits
        self.dtype = _TYPES[bits, signed]
        self.attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        shape = (-1,) if axis is not None else ()
        narrow = self.dtype if bits == 8 else torch.int32
        self.register_buffer("scale", scale.detach().clone().reshape(shape))
        self.register_buffer("zero_point", zero_point.detach().reshape(shape).to(narrow))

    def forward(self, tensor: Tensor) -> Tensor:
        """The pair. Only for export: elsewhere the operators compute nothing."""
        symbolic = torch.onnx.ops.symbolic
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


def _pair(simulator: Any, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> QuantizeDequantize:
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    signed = float(simulator.quant_min) < 0
    return QuantizeDequantize(scale, zero_point, simulator.n_bits, signed, axis)


def needs_4_bits(model: nn.Module) -> bool:
    """Whether a pair in the model is of 4 bits."""
    return any(isinstance(module, QuantizeDequantize) and module.bits == 4 for module in model.modules())


def install_qdq(model: nn.Module, weights: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Put pairs where a stripped model had simulators, in place.

    Args:
        model: the stripped model, with the buffers :data:`SCALE` and :data:`ZERO_POINT` in its layers.
        weights: the simulators of weights, by layer.
        inputs: the simulators of inputs, by layer.
    """
    for name, simulator in weights.items():
        layer: Any = model.get_submodule(name)
        scale, zero_point = getattr(layer, SCALE), getattr(layer, ZERO_POINT)
        delattr(layer, SCALE)
        delattr(layer, ZERO_POINT)
        axis = channel_axis_of(layer) if scale.numel() > 1 else None
        pair = _pair(simulator, scale, zero_point, axis)
        # unsafe: torch would run the pair to see what it returns.
        parametrize.register_parametrization(layer, "weight", pair, unsafe=True)
    for name, simulator in inputs.items():
        layer = model.get_submodule(name)
        scale, zero_point, _ = simulator.calculate_qparams()
        setattr(layer, INPUT, _pair(simulator, scale, zero_point, None))
