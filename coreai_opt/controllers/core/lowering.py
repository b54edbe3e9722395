"""Controlled models in what Core AI and Core ML hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.common import CoreMLExportError, ExportBackend
from coreai_opt.export import coreai, coreml
from coreai_opt.export.parametrized import hold
from coreai_opt.export.records import Affine, QuantizedActivation, WeightRecord

__all__ = [
    "LoweredActivation",
    "LoweredWeight",
    "lower_to",
    "quantized_activation",
    "quantized_weight",
]

# Bits of the integers that the converters store.
_WIDTHS = {ExportBackend.CoreAI: (2, 4, 8), ExportBackend.CoreML: (4, 8)}


@dataclass(frozen=True)
class LoweredWeight:
    """How a weight of a model without controllers is compressed.

    Attributes:
        name: its qualified name.
        module: that has it; the tensor is a plain parameter.
        attribute: its name in the module.
        record: what it is compressed to.
    """

    name: str
    module: nn.Module
    attribute: str
    record: WeightRecord


@dataclass(frozen=True)
class LoweredActivation:
    """How a tensor that passes a child of a module is quantized; it is run for this, and nothing else.

    Attributes:
        name: qualified name of the child.
        module: that has the child.
        child: its name in the module.
        record: how it quantizes.
    """

    name: str
    module: nn.Module
    child: str
    record: QuantizedActivation


def lower_to(
    backend: ExportBackend,
    model: nn.Module,
    weights: Iterable[LoweredWeight],
    activations: Iterable[LoweredActivation],
) -> None:
    """Express a model in what a converter reads, in place.

    Args:
        backend: Core AI or Core ML.
        model: without controllers.
        weights: its compressed weights; of several records of one, the last one counts, and for Core ML also
            that it was pruned before.
        activations: its quantized activations.

    Raises:
        ImportError: Core AI's operators are not installed.
        ValueError: the converter has no such compression.
        CoreMLExportError: the same.
    """
    if backend is ExportBackend.CoreAI:
        coreai.require_operators()
        _to_core_ai(weights, activations)
    else:
        _to_core_ml(model, weights, activations)


def _to_core_ai(weights: Iterable[LoweredWeight], activations: Iterable[LoweredActivation]) -> None:
    last = {(id(each.module), each.attribute): each for each in weights}
    constants: dict[int, nn.Module] = {}
    for each in last.values():
        shared = id(getattr(each.module, each.attribute))
        if shared not in constants:
            constants[shared] = coreai.weight_module(each.record, each.name)
        hold(each.module, each.attribute, constants[shared])
    for activation in activations:
        setattr(activation.module, activation.child, coreai.activation_module(activation.record))


def _to_core_ml(
    model: nn.Module, weights: Iterable[LoweredWeight], activations: Iterable[LoweredActivation]
) -> None:
    for each in weights:
        coreml.add_metadata(each.module, each.attribute, coreml.metadata_of(each.record, each.name))
    for activation in activations:
        record = activation.record
        if record.axis is not None:
            raise CoreMLExportError(
                f"CoreML export does not support activations per channel, as {activation.name!r} has: use "
                f"one range a tensor"
            )
        setattr(activation.module, activation.child, coreml.activation_module(record, torch.Size([])))
    coreml.mark(model)


@torch.no_grad()
def quantized_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor, simulator: Any, backend: ExportBackend
) -> Affine:
    """What a weight is quantized to. Widths that the converter lacks become the next wider ones.

    Args:
        weight: of quantized values.
        scale: of its range: one value, or one a channel in the rank of the weight.
        zero_point: as many.
        simulator: tells the integers.
        backend: for which converter.
    """
    low, high = int(simulator.quant_min), int(simulator.quant_max)
    bits = next(
        width for width in _WIDTHS[backend] if high - low < 1 << width and _holds(width, low < 0, low, high)
    )
    if scale.numel() == 1:
        scale, zero_point = (each.reshape([1] * weight.dim()) for each in (scale, zero_point))
    storage = torch.int8 if low < 0 else torch.uint8
    values = (torch.round(weight.float() / scale.float()) + zero_point).clamp(low, high).to(storage)
    dtype = getattr(torch, f"{'int' if low < 0 else 'uint'}{bits}")
    return Affine(values, scale.to(weight.dtype), zero_point.to(storage), None, dtype, weight.dtype)


def _holds(width: int, signed: bool, low: int, high: int) -> bool:
    least = -(1 << (width - 1)) if signed else 0
    return least <= low and high <= least + (1 << width) - 1


def quantized_activation(
    scale: Tensor, zero_point: Tensor, simulator: Any, dtype: torch.dtype
) -> QuantizedActivation:
    """How an activation is quantized: to 8 bits, clamped first where the simulator has a narrower range.

    Args:
        scale: of its range: one value, or one a channel in the rank of the activation.
        zero_point: as many.
        simulator: tells the integers.
        dtype: of the activation.
    """
    low, high = int(simulator.quant_min), int(simulator.quant_max)
    axis = next((axis for axis, size in enumerate(scale.shape) if size > 1), None)
    shape = () if axis is None else (-1,)
    scale, zero_point = scale.detach().float().reshape(shape), zero_point.detach().reshape(shape)
    storage = torch.int8 if low < 0 else torch.uint8
    least, greatest = (-128, 127) if low < 0 else (0, 255)
    lowest = None if low == least else ((low - zero_point) * scale).to(dtype)
    highest = None if high == greatest else ((high - zero_point) * scale).to(dtype)
    return QuantizedActivation(
        scale.to(dtype).clone(), zero_point.to(storage), None, storage, dtype, axis, lowest, highest
    )
