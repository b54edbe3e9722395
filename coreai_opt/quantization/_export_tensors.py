"""Quantized weights of prepared models as torchao's tensors: made before anything is changed, then put in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from coreai_opt.export.parametrized import Slot, slots_of
from coreai_opt.export.torchao_tensors import quantized_tensor
from coreai_opt.quantization._export_checks import check_observed
from coreai_opt.quantization._export_records import affine_weight, is_weight
from coreai_opt.quantization._graph.finalize import QuantizedWeight, quantized_weights
from coreai_opt.quantization._graph.folding import own_tensor
from coreai_opt.quantization._graph.nodes import attribute_of
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["eager_tensors", "graph_tensors", "put_eager_tensors", "put_graph_tensors"]

_READERS: dict[Any, type[nn.Module]] = {
    torch.ops.aten.linear.default: nn.Linear,
    torch.ops.aten.embedding.default: nn.Embedding,
    torch.ops.aten.conv2d.default: nn.Conv2d,
}

_FUNCTIONS = {
    torch.ops.aten.linear.default: F.linear,
    torch.ops.aten.embedding.default: F.embedding,
    torch.ops.aten.conv2d.default: F.conv2d,
}


def eager_tensors(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """For each quantized weight its module, its name in it, and the parameter that is to take its place.

    Raises:
        As :meth:`.Quantizer.finalize`.
    """
    slots = [slot for slot in slots_of(model, FakeQuantizeImplBase) if is_weight(slot.simulator)]
    check_observed([(slot.name, slot.simulator) for slot in slots])
    owners: dict[FakeQuantizeImplBase, list[Slot]] = {}
    for slot in slots:
        if len(slot.chain) > 1:
            raise ValueError(f"{slot.name!r} has other parametrizations: torchao's tensors cannot hold them")
        owners.setdefault(slot.simulator, []).append(slot)
    found = []
    for simulator, shared in owners.items():
        name = shared[0].name
        record = affine_weight(simulator, shared[0].value(), name)
        parameter = _parameter(quantized_tensor(record, name, [_layer_of(slot) for slot in shared]))
        found += [(slot.module, slot.attribute, parameter) for slot in shared]
    return found


def _layer_of(slot: Slot) -> type[nn.Module]:
    plain: type[nn.Module] = type(slot.module).__bases__[0]
    return plain if slot.attribute == "weight" else nn.Module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def put_eager_tensors(tensors: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Let modules, without parametrizations now, have the parameters of :func:`eager_tensors`."""
    for module, attribute, parameter in tensors:
        module._buffers.pop(attribute, None)
        module.register_parameter(attribute, parameter)


def graph_tensors(model: GraphModule) -> dict[str, nn.Parameter]:
    """The parameters that are to take the place of the quantized weights, by name.

    Raises:
        As :meth:`.Quantizer.finalize`.
    """
    weights = list(quantized_weights(model))
    check_observed([(weight.name, weight.quantizer) for weight in weights])
    readers: dict[int, set[Node]] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(id(attribute_of(model, node)), set()).update(node.users)
    made = {}
    for weight in weights:
        tensor = attribute_of(model, weight.source)
        assert isinstance(tensor, Tensor)
        if len(readers[id(tensor)]) > 1:
            raise ValueError(
                f"{weight.name!r} is also read without this quantizer: torchao's tensors cannot be both"
            )
        record = affine_weight(weight.quantizer, tensor, weight.name)
        made[weight.name] = _parameter(quantized_tensor(record, weight.name, _layers_of(weight)))
    return made


def _layers_of(weight: QuantizedWeight) -> list[type[nn.Module]]:
    found = []
    for user in weight.node.users:
        if user.target not in _READERS:
            raise ValueError(
                f"{weight.name!r} is read by {user.target}; torchao's tensors serve linear layers, "
                f"embeddings and two-dimensional convolutions"
            )
        found.append(_READERS[user.target])
    return found


def put_graph_tensors(model: GraphModule, tensors: Mapping[str, nn.Parameter]) -> None:
    """Let a graph module, whose weights are folded, have the parameters of :func:`graph_tensors`.

    They answer functions of torch; aten's operators would take themselves apart before they ask.
    """
    for name, parameter in tensors.items():
        own_tensor(model, name, parameter)
    for node in model.graph.nodes:
        if any(each.op == "get_attr" and each.target in tensors for each in node.all_input_nodes):
            if node.target == torch.ops.aten.embedding.default:
                node.args = (node.args[1], node.args[0])
            node.target = _FUNCTIONS[node.target]
    model.recompile()
