"""Convolutions take their batch norms in: what prepare rewrote becomes one operator again."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from coreai_opt.quantization._graph.conv_bn import BATCH_NORM_MARK, output_axis
from coreai_opt.quantization._graph.modes import batch_norm_arguments
from coreai_opt.quantization._graph.nodes import attribute_of, overload_name
from coreai_opt.quantization._graph.unscale import unscale
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["fold_batch_norms", "own_tensor"]

logger = logging.getLogger(__name__)


def fold_batch_norms(model: GraphModule) -> None:
    """Give the convolutions of rewritten pairs the folded weight and bias, and take the batch norms out.

    The quantizer of the weight stays, and so do the batch norms' parameters, which nothing reads any more.

    Args:
        model: is changed; tensors that it shares with others are replaced, not written.
    """
    graph = model.graph
    for node in list(graph.nodes):
        if BATCH_NORM_MARK in node.meta:
            parts = _parts(model, node)
            if parts is None:
                logger.warning(
                    f"{node.name!r} cannot be folded into its convolution, since something was inserted "
                    f"between them: it stays"
                )
                continue
            _fold(model, node, *parts)
    graph.eliminate_dead_code()
    model.recompile()


def _parts(model: GraphModule, batch_norm: Node) -> tuple[Node, Node, Node | None] | None:
    """The convolution, the node that scales its weight, and the one that reads its bias."""
    found: Any = batch_norm.args[0]
    bias = None
    if overload_name(found) == "add.Tensor":
        found, reshaped = found.args
        bias = reshaped.args[0]
    if found.target is not unscale:
        return None
    convolution = found.args[0]
    if not overload_name(convolution).startswith("conv"):
        return None
    scaled = _behind_quantizer(model, convolution.args[1])
    if overload_name(scaled) != "mul.Tensor" or scaled.args[0].op != "get_attr":
        return None
    return convolution, scaled, bias


def _behind_quantizer(model: GraphModule, node: Node) -> Any:
    is_quantizer = node.op == "call_module" and isinstance(
        model.get_submodule(str(node.target)), FakeQuantizeImplBase
    )
    return node.args[0] if is_quantizer else node


@torch.no_grad()
def _fold(model: GraphModule, batch_norm: Node, convolution: Node, scaled: Node, bias: Node | None) -> None:
    weight_node: Any = scaled.args[0]
    gamma, beta, mean, variance, eps = _numbers(model, batch_norm)
    weight: Any = attribute_of(model, weight_node)
    deviation = torch.sqrt(variance + eps)
    scale = torch.reciprocal(deviation) if gamma is None else gamma / deviation
    shape = [1] * weight.dim()
    shape[output_axis(convolution)] = -1
    old_bias: Any = torch.zeros_like(mean) if bias is None else attribute_of(model, bias)
    new_bias = (old_bias - mean) * scale
    new_bias = new_bias if beta is None else new_bias + beta
    name = str(weight_node.target)
    _stop_counting(model, batch_norm)
    folded = _new_parameter((weight * scale.reshape(shape)).to(weight.dtype), weight)
    new_weight = own_tensor(model, name, folded)
    # Read by the convolution alone where the weight has another reader.
    others = [user for user in weight_node.users if user is not scaled]
    bias_name = _sibling(name, "bias")
    if others:
        new_weight = _free_name(model, f"{name}_folded")
        own_tensor(model, new_weight, folded)
    own_bias = _new_parameter(new_bias.to(weight.dtype if bias is None else old_bias.dtype), weight)
    if bias is not None and len(bias.users) <= 2 and not others:
        bias_name = str(bias.target)
    elif _has(model, bias_name):
        bias_name = _free_name(model, f"{name}_bias")
    own_tensor(model, bias_name, own_bias)
    graph = model.graph
    weight_read = weight_node
    if others:
        with graph.inserting_before(scaled):
            weight_read = graph.get_attr(new_weight)
    with graph.inserting_before(convolution):
        bias_read = graph.get_attr(bias_name)
    scaled.replace_all_uses_with(weight_read)
    convolution.update_arg(2, bias_read)
    batch_norm.replace_all_uses_with(convolution)
    graph.erase_node(batch_norm)


def _numbers(model: GraphModule, batch_norm: Node) -> Any:
    arguments = batch_norm_arguments(batch_norm)
    chosen = (*arguments[1:5], arguments[7])
    return [attribute_of(model, each) if isinstance(each, Node) else each for each in chosen]


def _stop_counting(model: GraphModule, batch_norm: Node) -> None:
    """Erase the operator that counts the batches of a batch norm exported in training mode."""
    mean: Any = batch_norm.args[3]
    counter = _sibling(str(mean.target), "num_batches_tracked")
    for node in list(model.graph.nodes):
        first = node.args[0] if node.args else None
        if overload_name(node) == "add_.Tensor" and isinstance(first, Node) and first.target == counter:
            model.graph.erase_node(node)


def _new_parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=like.requires_grad)


def _sibling(name: str, attribute: str) -> str:
    owner, _, _ = name.rpartition(".")
    return f"{owner}.{attribute}" if owner else attribute


def _has(model: GraphModule, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute, None) is not None


def _free_name(model: GraphModule, name: str) -> str:
    number, found = 0, name
    while _has(model, found):
        number += 1
        found = f"{name}_{number}"
    return found


def own_tensor(model: GraphModule, name: str, value: Tensor) -> str:
    """Put ``value`` under a dotted name, in place of what is there. Returns the name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    # In its own table it keeps its position.
    if isinstance(value, nn.Parameter):
        module._buffers.pop(attribute, None)
        module.register_parameter(attribute, value)
    else:
        module._parameters.pop(attribute, None)
        module.register_buffer(attribute, value)
    return name
