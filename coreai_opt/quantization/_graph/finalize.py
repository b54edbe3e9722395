"""From a prepared graph module to one without simulated weights; the prepared one stays as it is."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from coreai_opt._prepared_models import MARKS
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.attributes import OWNERS, attach, attached, restore_metadata
from coreai_opt.quantization._graph.folding import fold_batch_norms, own_tensor
from coreai_opt.quantization._graph.graph_module import QuantizedGraphModule, copied
from coreai_opt.quantization._graph.insert import quantizer_nodes
from coreai_opt.quantization._graph.nodes import attribute_of
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = [
    "QuantizedWeight",
    "finalized_copy",
    "fold_weights",
    "quantized_activations",
    "quantized_weights",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedWeight:
    """A parameter or buffer that a quantizer reads.

    Fields:
        name: of the tensor in the graph module.
        source: the node that reads it.
        node: the quantizer's.
        quantizer: its module.
    """

    name: str
    source: Node
    node: Node
    quantizer: FakeQuantizeImplBase


def finalized_copy(prepared: GraphModule) -> GraphModule:
    """A graph module of its own, with batch norms folded and all quantizers in place.

    It shares tensors with the prepared one, except those that folding changes, and has its own quantizers.
    """
    # GraphModule makes modules of its own for all but the quantizers.
    result = QuantizedGraphModule(prepared, copied(prepared.graph))
    copies: dict[int, Any] = {}
    for node, quantizer in quantizer_nodes(result):
        setattr(result, str(node.target), copy.deepcopy(quantizer, copies))
    result.meta[OWNERS] = dict(prepared.meta.get(OWNERS, {}))
    kept = {name: value for name, value in attached(prepared).items() if name not in MARKS}
    attach(result, kept)
    restore_metadata(prepared, result)
    result.train(prepared.training)
    fold_batch_norms(result)
    return result


def quantized_weights(model: GraphModule) -> Iterator[QuantizedWeight]:
    """The quantizers of parameters and buffers, in the order of the graph; shared ones at each place."""
    for node, quantizer in quantizer_nodes(model):
        source = node.all_input_nodes[0]
        if source.op == "get_attr" and quantizer.quantization_target is CompressionTargetTensor.WEIGHT:
            yield QuantizedWeight(str(source.target), source, node, quantizer)


def quantized_activations(model: GraphModule) -> Iterator[tuple[Node, FakeQuantizeImplBase]]:
    """The other quantizers."""
    weights = {each.node for each in quantized_weights(model)}
    return ((node, quantizer) for node, quantizer in quantizer_nodes(model) if node not in weights)


@torch.no_grad()
def fold_weights(model: GraphModule) -> None:
    """Replace weights by what their quantizers make of them, and take these quantizers out.

    A weight that is also read without its quantizer keeps it, with a warning in the log.

    Args:
        model: is changed; tensors that it shares with others are replaced, not written.
    """
    readers: dict[int, set[Node]] = {}
    for node in model.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(id(attribute_of(model, node)), set()).update(node.users)
    for weight in list(quantized_weights(model)):
        tensor: Any = attribute_of(model, weight.source)
        others = readers[id(tensor)] - {weight.node}
        if others:
            logger.warning(
                f"{weight.name!r} is also read by {sorted(each.name for each in others)} without its "
                f"quantizer: it stays as it is, and so does the quantizer"
            )
            continue
        own_tensor(model, weight.name, _simulated(weight.quantizer, tensor))
        weight.node.replace_all_uses_with(weight.source)
        model.graph.erase_node(weight.node)
        delattr(model, str(weight.node.target))
    model.graph.eliminate_dead_code()
    model.recompile()


def _simulated(quantizer: FakeQuantizeImplBase, tensor: Tensor) -> Tensor:
    quantizer.disable_observer()
    quantizer.enable_fake_quant()
    value = quantizer(tensor.detach()).clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value
