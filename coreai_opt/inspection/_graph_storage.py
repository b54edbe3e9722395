"""The quantized parameters of a graph that was prepared, and what their quantizers make of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.insert import quantizer_nodes
from coreai_opt.quantization._graph.nodes import attribute_of
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["is_prepared_graph", "weight_quantizers", "weight_values"]


def is_prepared_graph(model: Any) -> bool:
    """Whether it is a graph with quantizers in it."""
    return isinstance(model, fx.GraphModule) and any(True for _ in quantizer_nodes(model))


def weight_quantizers(graph: fx.GraphModule) -> dict[str, tuple[FakeQuantizeImplBase, ...]]:
    """The quantizer of each quantized parameter or buffer, by the tensor's name in the graph."""
    return {name: (quantizer,) for name, _, quantizer in _quantized(graph)}


def weight_values(graph: fx.GraphModule, name: str) -> tuple[Tensor, Tensor]:
    """What the quantizer of a parameter reads, and what it makes of it.

    A convolution before a batch norm reads its weight times the norm's.
    """
    node, quantizer = next((node, quantizer) for found, node, quantizer in _quantized(graph) if found == name)
    with torch.no_grad():
        before = _value(graph, node.all_input_nodes[0])
        return before, quantizer(before)


def _quantized(graph: fx.GraphModule) -> Iterator[tuple[str, fx.Node, FakeQuantizeImplBase]]:
    for node, quantizer in quantizer_nodes(graph):
        source = node.all_input_nodes[0]
        if source.target is torch.ops.aten.mul.Tensor:  # by the batch norm behind the convolution
            source = source.all_input_nodes[0]
        if source.op == "get_attr" and quantizer.quantization_target is CompressionTargetTensor.WEIGHT:
            yield str(source.target), node, quantizer


def _value(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The value of a node that depends on parameters and buffers alone."""
    if node.op == "get_attr":
        return attribute_of(graph, node)
    assert callable(node.target)
    return node.target(
        *fx.map_arg(node.args, lambda each: _value(graph, each)),
        **fx.map_arg(node.kwargs, lambda each: _value(graph, each)),
    )
