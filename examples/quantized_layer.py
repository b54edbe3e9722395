"""How ``digits_qat.py`` quantizes a model: a simulator on each weight, and one on each layer's input."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import coreai_kernels
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)

BLOCK = 64

# 4-bit weights: each block of 64 input channels of an output channel has a scale of its own.
BLOCKWISE_INT4 = QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(axis=1, block_size=BLOCK))
# The first layer reads a single channel, which cannot be cut into blocks, and has few weights.
CHANNELWISE_INT8 = QuantizationSpec(dtype=torch.int8, granularity=PerChannelGranularity(axis=0))
# 8-bit activations: one scale for the whole tensor, from a moving average of the batches' ranges.
ACTIVATION_INT8 = QuantizationSpec(dtype=torch.int8, qparam_calculator_cls="moving_average")


class QuantizedLayer(nn.Module):
    """A linear or convolutional layer that computes with quantized weights and quantized inputs."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight_spec = BLOCKWISE_INT4 if layer.weight.shape[1] % BLOCK == 0 else CHANNELWISE_INT8
        construct = QuantizationComponentFactory.construct
        self.weight_simulator = construct(weight_spec, CompressionTargetTensor.WEIGHT)
        self.input_simulator = construct(ACTIVATION_INT8, CompressionTargetTensor.ACTIVATION)
        # From here on `layer.weight` is the simulator's output; the optimizer trains the float original.
        parametrize.register_parametrization(layer, "weight", self.weight_simulator)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.input_simulator(x))


def quantized_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every linear and convolutional layer is a :class:`QuantizedLayer`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d):
                setattr(parent, name, QuantizedLayer(child))
    return model


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLayer]:
    return (module for module in model.modules() if isinstance(module, QuantizedLayer))


@contextmanager
def frozen_ranges(model: nn.Module) -> Iterator[None]:
    """Use the activations' ranges and do not update them: test images must leave no trace in the model.

    The weights' ranges need no such care. They follow from the weights alone.
    """
    for layer in quantized_layers(model):
        layer.input_simulator.disable_observer()
    try:
        yield
    finally:
        for layer in quantized_layers(model):
            layer.input_simulator.enable_observer()


@dataclass(frozen=True)
class Size:
    """Bytes of a stored model. ``rest`` is what stays in float32: biases, norms, the inputs' scales."""

    weights: int
    scales: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.scales + self.rest


def float_size(model: nn.Module) -> Size:
    return Size(weights=0, scales=0, rest=sum(p.nbytes for p in model.parameters()))


@torch.no_grad()
def packed_size(model: nn.Module) -> Size:
    """Pack the weights of a quantized model as a file would hold them, and count the bytes.

    Raises:
        RuntimeError: the packed weights do not stand for exactly what the model computed with.
    """
    weights = scales = 0
    rest = sum(p.nbytes for p in model.parameters())
    for layer in quantized_layers(model):
        simulator = layer.weight_simulator
        original = layer.layer.parametrizations.weight.original
        simulated = layer.layer.weight
        scale, zero_point, _ = simulator.calculate_qparams()
        values = {
            "block_size": simulator.get_block_size(original.shape),
            "quant_min": simulator.quant_min,
        }
        integers = coreai_kernels.quantize(
            original, scale, zero_point, **values, quant_max=simulator.quant_max, dtype=torch.int8
        )
        packed = coreai_kernels.pack_bits(integers, simulator.n_bits)

        unpacked = coreai_kernels.unpack_bits(packed, simulator.n_bits, integers.numel(), signed=True)
        restored = coreai_kernels.dequantize(unpacked.reshape(original.shape), scale, zero_point, **values)
        if not torch.equal(restored.view(torch.int32), simulated.view(torch.int32)):
            raise RuntimeError(f"packed weights {tuple(original.shape)} differ from the simulated ones")
        # The scheme is symmetric: all zero points are 0, and need no place in a file.
        weights += packed.nbytes
        scales += scale.nbytes
        rest += layer.input_simulator.calculate_qparams()[0].nbytes - original.nbytes
    return Size(weights, scales, rest)
