"""Quantizers into the graph: who shares one by reading the same tensor, and where each of them stands."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.nodes import attribute_of, tensor_of
from coreai_opt.quantization._graph.resolve import Place, Placement, Planned
from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["PREFIX", "build", "insert", "quantizer_nodes"]

# Of the attributes of the graph module that hold quantizers; a number follows.
PREFIX = "activation_post_process_"


def build(graph: Graph, placement: Placement) -> dict[Place, FakeQuantizeImplBase]:
    """Construct quantizers, one for all places that share it.

    Places share what they were planned to share. Besides, places at one tensor share if dtype and the limits
    of quantized values are equal, whatever else their specifications say: the first one's holds, in the order
    of the graph.
    """
    ordered = placement.in_order(graph)
    groups = _Groups(place for place, _ in ordered)
    first_of: dict[Planned | FakeQuantizeImplBase, Place] = {}
    readers: dict[tuple[Any, ...], Place] = {}
    for place, planned in ordered:
        groups.join(first_of.setdefault(planned, place), place)
        groups.join(readers.setdefault(_kind(place, planned), place), place)
    built: dict[Place, FakeQuantizeImplBase] = {}
    result = {}
    for place, planned in ordered:
        root = groups.root(place)
        if root not in built:
            built[root] = _quantizer(planned)
        result[place] = built[root]
    return result


def _quantizer(planned: Planned | FakeQuantizeImplBase) -> FakeQuantizeImplBase:
    if isinstance(planned, FakeQuantizeImplBase):
        return planned
    spec, target = _of(planned)
    return QuantizationComponentFactory.create_fake_quantizer(spec, target)


def _of(planned: Planned) -> tuple[QuantizationSpec, CompressionTargetTensor]:
    return planned.spec, planned.target


def _kind(place: Place, planned: Planned | FakeQuantizeImplBase) -> tuple[Any, ...]:
    if isinstance(planned, FakeQuantizeImplBase):
        return place.producer, planned
    spec, _ = _of(planned)
    return place.producer, spec.dtype, spec.quant_min, spec.quant_max


class _Groups:
    """Disjoint sets of places. The root of each is the one that came first."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._order = {place: index for index, place in enumerate(places)}
        self._parents: dict[Place, Place] = {}

    def root(self, place: Place) -> Place:
        while place in self._parents:
            place = self._parents[place]
        return place

    def join(self, one: Place, other: Place) -> None:
        roots = sorted({self.root(one), self.root(other)}, key=self._order.__getitem__)
        for later in roots[1:]:
            self._parents[later] = roots[0]


def insert(model: GraphModule, quantizers: dict[Place, FakeQuantizeImplBase]) -> None:
    """Put the quantizers into the graph, as attributes of ``model`` called ``activation_post_process_N``.

    Of each node come its inputs first, in the order of its arguments, then its output. Buffers that the node
    writes into are not quantized.
    """
    for node in list(model.graph.nodes):
        producers = [_tensor_behind(model, each) for each in node.all_input_nodes]
        edges = {producer: Place(producer, node) for producer in producers}
        written = _written_buffer(model, node)
        chosen = {
            producer: quantizers[place]
            for producer, place in edges.items()
            if place in quantizers and producer is not written
        }
        if chosen:
            _insert_inputs(model, node, chosen, quantizers)
        own = quantizers.get(Place(node))
        if own is not None:
            behind = _insert_after(model, node, own)
            for user in list(node.users):
                if user is not behind:
                    user.replace_input_with(node, behind)


def _insert_inputs(
    model: GraphModule,
    node: Node,
    chosen: dict[Node, FakeQuantizeImplBase],
    quantizers: dict[Place, FakeQuantizeImplBase],
) -> None:
    def replaced(argument: Node) -> Node:
        producer = _tensor_behind(model, argument)
        quantizer = chosen.get(producer)
        if quantizer is None or quantizers.get(Place(producer)) is quantizer:
            return argument
        for user in argument.users:
            if user.op == "call_module" and _module_of(model, user) is quantizer:
                return user
        return _insert_after(model, argument, quantizer)

    node.args = tuple(map_arg(argument, replaced) for argument in node.args)
    node.kwargs = {name: map_arg(argument, replaced) for name, argument in node.kwargs.items()}


def _module_of(model: GraphModule, node: Node) -> nn.Module | None:
    return model._modules.get(str(node.target)) if node.op == "call_module" else None


def _tensor_behind(model: GraphModule, node: Node) -> Node:
    """The node whose tensor it is, quantizers skipped."""
    while isinstance(_module_of(model, node), FakeQuantizeImplBase):
        node = node.all_input_nodes[0]
    return node


def _insert_after(model: GraphModule, node: Node, quantizer: FakeQuantizeImplBase) -> Node:
    number = 0
    while hasattr(model, f"{PREFIX}{number}"):
        number += 1
    name = f"{PREFIX}{number}"
    model.add_module(name, quantizer.to(_device_of(model, node)))
    with model.graph.inserting_after(node):
        return model.graph.call_module(name, (node,))


def _device_of(model: GraphModule, node: Node) -> torch.device:
    """The device of the node's tensor."""
    node = _tensor_behind(model, node)
    tensor = attribute_of(model, node) if node.op == "get_attr" else tensor_of(node)
    if isinstance(tensor, Tensor) and not tensor.is_meta:
        return tensor.device
    # A weight scaled for its batch norm.
    return next(_device_of(model, each) for each in node.all_input_nodes)


def _written_buffer(model: GraphModule, node: Node) -> Node | None:
    """The node's first argument, if the node writes into it and it is made of buffers alone."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not node.args:
        return None
    arguments = target._schema.arguments
    first = node.args[0]
    writes = bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    if not writes or not isinstance(first, Node):
        return None
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    sources = _sources(first)
    if any(each.op == "placeholder" for each in sources):
        return None
    return first if any(each.op == "get_attr" and each.target in buffers for each in sources) else None


def _sources(node: Node) -> set[Node]:
    """The node and all that it is computed from."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return found


def quantizer_nodes(model: GraphModule) -> list[tuple[Node, FakeQuantizeImplBase]]:
    """The quantizers in the graph, in its order; a shared one at each of its places."""
    found = []
    for node in model.graph.nodes:
        module = _module_of(model, node)
        if isinstance(module, FakeQuantizeImplBase):
            found.append((node, module))
    return found
