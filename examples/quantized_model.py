"""How ``digits_qat.py`` quantizes a model: a configuration, and a Quantizer that does what it says."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import coreai_kernels
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationSpec,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

BLOCK = 64

# 4-bit weights: each block of 64 input channels of an output channel has a scale of its own.
BLOCKWISE_INT4 = QuantizationSpec(dtype=torch.int4, granularity=PerBlockGranularity(axis=1, block_size=BLOCK))
# The first layer reads a single channel, which cannot be cut into blocks, and has few weights.
CHANNELWISE_INT8 = QuantizationSpec(dtype=torch.int8, granularity=PerChannelGranularity(axis=0))
# 8-bit activations: one scale for the whole tensor, from a moving average of the batches' ranges.
ACTIVATION_INT8 = QuantizationSpec(dtype=torch.int8, qparam_calculator_cls="moving_average")


def layer_config(weight_spec: QuantizationSpec) -> ModuleQuantizerConfig:
    """Quantize the weights and inputs of layers; sums stay in float."""
    return ModuleQuantizerConfig(
        op_input_spec={"*": ACTIVATION_INT8},
        op_output_spec=None,
        op_state_spec={"weight": weight_spec},
        op_type_config={"add": None},
    )


def configuration(mode: str) -> QuantizerConfig:
    """The same for the model itself (``"eager"``) and for a graph of it (``"graph"``)."""
    return QuantizerConfig(
        execution_mode=mode,
        global_config=layer_config(BLOCKWISE_INT4),
        module_name_configs={"stem": layer_config(CHANNELWISE_INT8)},
    )


CONFIG = configuration("eager")


@dataclass
class Quantization:
    """A quantized model, and the quantizer that prepared it."""

    model: nn.Module
    quantizer: Quantizer

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, batch: int, mode: str = "eager") -> "Quantization":
        """Quantize a copy of ``model``. The ranges of its activations are those of the ``images``."""
        quantizer = Quantizer(copy.deepcopy(model), configuration(mode))
        sizes = None if mode == "eager" else ({0: torch.export.Dim("batch")},)
        model = quantizer.prepare((images[:batch],), dynamic_shapes=sizes)
        with quantizer.calibration_mode(), torch.no_grad():
            for part in images.split(batch):
                model(part)
        return cls(model, quantizer)

    def copied(self) -> "Quantization":
        model = copy.deepcopy(self.model)
        return Quantization(model, Quantizer(model, CONFIG))

    def training(self) -> AbstractContextManager[None]:
        """While it is active, ranges follow the data; at other times they stay."""
        return self.quantizer.training_mode()

    def observing(self) -> nn.Module:
        """A copy of the model whose ranges always follow the data."""
        copied = self.copied()
        copied.quantizer.enable_observer()
        return copied.model


def weight_simulators(model: nn.Module) -> Iterator[tuple[Tensor, FakeQuantizeImplBase]]:
    """Each quantized weight, as it is trained, and its simulator."""
    if isinstance(model, torch.fx.GraphModule):
        for node in model.graph.nodes:
            simulator = getattr(model, str(node.target), None) if node.op == "call_module" else None
            if simulator is not None and simulator.quantization_target is CompressionTargetTensor.WEIGHT:
                yield model.get_parameter(node.args[0].target), simulator
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            yield module.parametrizations.weight.original, module.parametrizations.weight[0]


def activation_simulators(model: nn.Module) -> Iterator[FakeQuantizeImplBase]:
    simulators = (module for module in model.modules() if isinstance(module, FakeQuantizeImplBase))
    return (each for each in simulators if each.quantization_target is CompressionTargetTensor.ACTIVATION)


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
    for original, simulator in weight_simulators(model):
        simulated = simulator(original)
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
        rest -= original.nbytes
    rest += sum(simulator.calculate_qparams()[0].nbytes for simulator in activation_simulators(model))
    return Size(weights, scales, rest)
