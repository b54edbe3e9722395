"""Weights that post-training algorithms change: matrices with groups of columns that share a scale."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.insert import quantizer_nodes
from coreai_opt.quantization._graph.nodes import attribute_of
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec._plan import STATE, QuantizationPlan, plan_for
from coreai_opt.quantization.spec._state import UNSHAPED
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["Columns", "Layer", "find_layers", "forget", "simulated_parameters"]


@dataclass(eq=False)
class Layer:
    """A quantized weight of a prepared model.

    Attributes:
        name: its qualified name, as before ``prepare``; the first of a shared one.
        module: the module that owns it.
        simulator: what quantizes it.
        weight: the parameter behind the simulator.
        operation: of the call that reads it, as in :class:`Reading`; empty as long as none has been seen.
        settings: of a convolution: stride, padding, dilation and groups.
        own_bias: in a graph, what the call adds.
    """

    name: str
    module: nn.Module
    simulator: FakeQuantizeImplBase
    weight: nn.Parameter
    operation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    own_bias: nn.Parameter | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has inputs on axis 0 and outputs on axis 1."""
        return "transpose" in self.operation

    def outputs_first(self, tensor: Tensor) -> Tensor:
        """A tensor with the weight's axes, or a view of it, with outputs on axis 0; and the way back."""
        return tensor.transpose(0, 1) if self.is_transposed else tensor

    @property
    def groups(self) -> int:
        """Parts of the outputs that have inputs of their own; 1 but for grouped convolutions."""
        return int(self.settings.get("groups", 1))

    @property
    def bias(self) -> Tensor | None:
        """What the module adds to each output channel, if it is known."""
        if isinstance(self.module, GraphModule):
            return self.own_bias
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, nn.Parameter) else None

    def plan(self) -> QuantizationPlan:
        """How the simulator quantizes the weight."""
        return plan_for(self.simulator, self.weight)

    def quantized(self) -> Tensor:
        """The weight as it is simulated, in float32."""
        calculator: Any = self.simulator.qparams_calculator
        return self.simulator._simulate(self.weight.detach().float(), calculator.get_qparams())

    def observe(self) -> None:
        """Choose the parameters anew, from the weight as it is."""
        calculator: Any = self.simulator.qparams_calculator
        calculator.set_export_mode(False)
        forget(calculator)
        with torch.no_grad():
            calculator(self.weight.detach())

    def keep_parameters(self) -> None:
        """From now on, neither calibration nor training chooses the parameters."""
        self.simulator.set_export_mode(True)


def forget(calculator: Any) -> None:
    """Empty a calculator's buffers, as if it had observed nothing."""
    for name in STATE:
        buffer = getattr(calculator, name, None)
        if buffer is not None:
            setattr(calculator, name, torch.empty(UNSHAPED, dtype=buffer.dtype, device=buffer.device))


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """The quantized weights of a prepared model; and those left out, with the reason."""
    layers: dict[int, Layer] = {}
    left_out: dict[str, str] = {}
    found = _in_graph(model, left_out) if isinstance(model, GraphModule) else _on_modules(model, left_out)
    for layer in found:
        if not layer.simulator._simulates_as_built_in():
            left_out[layer.name] = f"{type(layer.simulator).__name__} quantizes in a way of its own"
        elif not layer.simulator.is_disabled():
            known = layers.setdefault(id(layer.weight), layer)
            if known.simulator is not layer.simulator:
                left_out[known.name] = "several quantizers are on the same weight"
    return [each for each in layers.values() if each.name not in left_out], left_out


def simulated_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that simulators of any kind change."""
    if isinstance(model, GraphModule):
        sources = (node.all_input_nodes[0] for node, _ in quantizer_nodes(model))
        return {id(attribute_of(model, each)) for each in sources if each.op == "get_attr"}
    return {
        id(chain.original)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for chain in module.parametrizations.values()  # type: ignore[operator, union-attr]
    }


def _on_modules(model: nn.Module, left_out: dict[str, str]) -> Iterator[Layer]:
    for module_name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
            simulators = [each for each in chain if isinstance(each, FakeQuantizeImplBase)]
            name = f"{module_name}.{attribute}".lstrip(".")
            if simulators and len(chain) > 1:
                left_out[name] = "another parametrization is on the same weight"
            elif simulators:
                yield Layer(name, module, simulators[0], chain.original)


def _in_graph(model: GraphModule, left_out: dict[str, str]) -> Iterator[Layer]:
    for node, simulator in quantizer_nodes(model):
        if simulator.quantization_target is not CompressionTargetTensor.WEIGHT:
            continue
        source = node.all_input_nodes[0]
        weight = attribute_of(model, source) if source.op == "get_attr" else None
        if isinstance(weight, nn.Parameter):
            layer = Layer(str(source.target), model, simulator, weight)
            layer.own_bias = _bias_beside(model, node)
            yield layer
        else:
            left_out[simulator.tensor_fqn or str(node.target)] = (
                "it is computed, such as with a batch norm that is folded into it: fuse these before prepare "
                "(torch.nn.utils.fusion.fuse_conv_bn_eval), or use eager mode"
            )


def _bias_beside(model: GraphModule, weight: Node) -> nn.Parameter | None:
    """The bias of the one call that reads the weight."""
    users = list(weight.users)
    if len(users) != 1 or len(users[0].args) < 3 or users[0].args[1] is not weight:
        return None
    bias = users[0].args[2]
    found = attribute_of(model, bias) if isinstance(bias, Node) and bias.op == "get_attr" else None
    return found if isinstance(found, nn.Parameter) else None


class Columns:
    """A layer's weight as a matrix ``[rows, columns]``, and the parameters of groups of its columns.

    Rows are the output channels, columns what one output sums over: input channels, each with its positions
    in the kernel. ``width`` neighbouring columns share parameters.

    Raises:
        ValueError: the blocks do not lie along the columns.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.plan = layer.plan()
        self.shape = layer.outputs_first(layer.weight).shape
        shape, block = self.shape, list(self.plan.block_size)
        if layer.is_transposed:
            block[0], block[1] = block[1], block[0]
            if layer.groups > 1:
                raise ValueError(f"{layer.name}: transposed convolutions in groups are not treated")
        self.rows, self.columns = shape[0], math.prod(shape[1:])
        self.block_rows, self.width = block[0], math.prod(block[1:])
        first = next((axis for axis in range(1, len(shape)) if block[axis] > 1), len(shape))
        if any(block[axis] != shape[axis] for axis in range(first + 1, len(shape))):
            raise ValueError(
                f"{layer.name}: its blocks of shape {self.plan.block_size} do not lie side by side along the "
                f"inputs; choose a granularity per tensor, per channel of the outputs (axis 0; of transposed "
                f"weights 1), or per block along the inputs (axis 1; 0)"
            )
        # Groups can get parameters one by one if each is a slice along axis 1, and of no other's concern.
        spans = all(block[axis] == shape[axis] for axis in range(2, len(shape)))
        calculator: Any = layer.simulator.qparams_calculator
        self._calculator = copy.deepcopy(calculator)
        scale_format = _numbers.scale_format_of(self._calculator.scale_dtype)
        self.are_independent = spans and scale_format.facts.smallest_of_tensor == 0.0
        self._calculator.set_export_mode(False)

    @property
    def groups(self) -> int:
        """How many groups of columns there are."""
        return self.columns // self.width

    def matrix(self) -> Tensor:
        """The weight in float32, ``[rows, columns]``; a copy."""
        weight = self.layer.outputs_first(self.layer.weight.detach())
        return weight.reshape(self.rows, self.columns).float().clone()

    def tables(self, matrix: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Parameters of some neighbouring groups of columns, as ``gptq_columns`` takes them.

        Args:
            matrix: float32 of shape ``[rows, n]``: the values of these columns.

        Returns:
            Scale, and zero point or minimum or neither, each of shape ``[n / width, rows]``.
        """
        forget(self._calculator)
        shape = (self.rows, -1, *self.shape[2:])
        qparams = self._calculator(self.layer.outputs_first(matrix.reshape(shape)))
        scale, zero_point, minval = (None if each is None else self._table(each) for each in qparams)
        assert scale is not None
        if self.plan.uses_minval:
            return scale, None, minval
        return scale, zero_point, None

    def _table(self, values: Tensor) -> Tensor:
        by_rows = self.layer.outputs_first(values).reshape(self.rows // self.block_rows, -1)
        return by_rows.repeat_interleave(self.block_rows, 0).t().contiguous()

    def rounded(self, weight: Tensor) -> Tensor:
        """Another weight of the layer's shape, in float32, as it would be simulated."""
        forget(self._calculator)
        return self.layer.simulator._simulate(weight, self._calculator(weight))

    def write(self, matrix: Tensor, scales: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        """Give the layer this weight and these parameters, of all groups, and keep them.

        A weight in float32 is kept as it is, before its rounding: training goes on from there. Another dtype
        would move it, so that it gets the rounded values.
        """
        layer = self.layer
        calculator: Any = layer.simulator.qparams_calculator
        names = ("scale", "minval" if self.plan.uses_minval else "zero_point")
        values = (scales[0], scales[2] if self.plan.uses_minval else scales[1])
        with torch.no_grad():
            for name, table in zip(names, values, strict=True):
                if table is not None:
                    buffer: Tensor = getattr(calculator, name)
                    first = layer.outputs_first(buffer)
                    first.copy_(table.t()[:: self.block_rows].reshape(first.shape))
            value = layer.outputs_first(matrix.reshape(self.shape))
            if layer.weight.dtype != torch.float32:
                value = layer.simulator._simulate(value, calculator.get_qparams())
            layer.weight.copy_(value)
        layer.keep_parameters()
