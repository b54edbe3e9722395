"""Convolutions with a batch norm behind: quantized with the weight that remains when both become one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from coreai_opt.quantization._graph.deviation import deviation
from coreai_opt.quantization._graph.modes import batch_norm_arguments
from coreai_opt.quantization._graph.nodes import overload_name, tensor_of
from coreai_opt.quantization._graph.patterns import BATCH_NORM
from coreai_opt.quantization._graph.resolve import Place, Placement
from coreai_opt.quantization._graph.unscale import unscale

__all__ = ["BATCH_NORM_MARK", "output_axis", "scale_batch_norms"]

aten: Any = torch.ops.aten
# In the metadata of a batch norm that was rewritten.
BATCH_NORM_MARK = "coreai_opt_scaled_batch_norm"
# In the order in which they are rewritten.
_CONVOLUTIONS = ("conv1d.default", "conv2d.default", "conv_transpose1d.default", "conv_transpose2d.input")


def output_axis(convolution: Node) -> int:
    """The axis of the weight that counts output channels."""
    return 1 if "transpose" in overload_name(convolution) else 0


@dataclass(frozen=True)
class _Pair:
    convolution: Node
    batch_norm: Node

    @property
    def bias(self) -> Node | None:
        arguments = self.convolution.args
        return arguments[2] if len(arguments) > 2 else None  # type: ignore[return-value]


def scale_batch_norms(graph: Graph, placement: Placement) -> None:
    """Rewrite each pair so that the convolution has the weight of the folded pair.

    With s = gamma / sqrt(running variance + eps): the convolution takes weight * s and no bias, its output
    is divided by s, the bias is added, and the batch norm follows. What is quantized as the weight is
    weight * s.
    Pairs without running statistics stay as they are.

    Args:
        graph: is changed.
        placement: follows the nodes.
    """
    for name in _CONVOLUTIONS:
        pairs = [pair for pair in map(_pair, graph.nodes) if pair is not None]
        own = [pair for pair in pairs if overload_name(pair.convolution) == name]
        # The order in which new nodes come decides on quantizers' numbers: with a bias first.
        for pair in sorted(own, key=lambda each: each.bias is None):
            _move(placement, _rewrite(graph, pair))


def _pair(node: Node) -> _Pair | None:
    if overload_name(node) != BATCH_NORM or BATCH_NORM_MARK in node.meta:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or overload_name(source) not in _CONVOLUTIONS or len(source.users) != 1:
        return None
    has_statistics = isinstance(node.args[3], Node) and isinstance(node.args[4], Node)
    operands = [each for each in (*source.args, *node.args[1:]) if isinstance(each, Node)]
    return _Pair(source, node) if has_statistics and len(operands) == len(set(operands)) else None


def _rewrite(graph: Graph, pair: _Pair) -> dict[Node, Node]:
    """Replace a pair. Returns the nodes that stand for its nodes and operands in quantization."""
    convolution, batch_norm, bias = pair.convolution, pair.batch_norm, pair.bias
    x, weight = convolution.args[:2]
    _, gamma, beta, mean, variance, training, momentum, eps, cudnn = batch_norm_arguments(batch_norm)
    weight_tensor = tensor_of(weight)  # type: ignore[arg-type]
    rank = weight_tensor.dim() if weight_tensor is not None else 0
    over_weight = [1] * rank
    over_weight[output_axis(convolution)] = -1
    over_output = [1] * rank
    over_output[1] = -1

    def call(target: Any, arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> Node:
        name = str(target).split(".")[1]
        return graph.create_node("call_function", target, arguments, options or {}, name=name)

    with graph.inserting_before(_first_user(graph, batch_norm)):
        total = call(aten.add.Tensor, (variance, eps))
        root = graph.create_node("call_function", deviation, (total,), name="sqrt")
        scale = (
            call(aten.reciprocal.default, (root,)) if gamma is None else call(aten.div.Tensor, (gamma, root))
        )
        scaled = call(aten.mul.Tensor, (weight, call(aten.reshape.default, (scale, over_weight))))
        no_bias = None if bias is None else call(aten.zeros_like.default, (bias,))
        output = call(convolution.target, (x, scaled, no_bias, *convolution.args[3:]), convolution.kwargs)
        over = call(aten.reshape.default, (scale, over_output))
        found = graph.create_node("call_function", unscale, (output, over), name="div")
        if bias is not None:
            found = call(aten.add.Tensor, (found, call(aten.reshape.default, (bias, over_output))))
        result = call(batch_norm.target, (found, gamma, beta, mean, variance, training, momentum, eps, cudnn))
    output.meta = convolution.meta
    result.meta = {**batch_norm.meta, BATCH_NORM_MARK: True}
    scaled.meta = {"nn_module_stack": convolution.meta.get("nn_module_stack"), "val": weight_tensor}
    batch_norm.replace_all_uses_with(result)
    graph.erase_node(batch_norm)
    graph.erase_node(convolution)
    moved = {convolution: output, batch_norm: result, weight: scaled}
    if bias is not None and no_bias is not None:
        moved[bias] = no_bias
    return moved  # type: ignore[return-value]


def _first_user(graph: Graph, node: Node) -> Node:
    users = set(node.users)
    return next((each for each in graph.nodes if each in users), node.next)


def _move(placement: Placement, moved: dict[Node, Node]) -> None:
    convolution = next(iter(moved))
    found = {}
    for place, planned in placement.places.items():
        producer, reader = place.producer, place.reader
        if reader is convolution or producer is convolution or overload_name(producer) == BATCH_NORM:
            producer = moved.get(producer, producer)
        found[Place(producer, moved.get(reader, reader) if reader is not None else None)] = planned
    placement.places = found
