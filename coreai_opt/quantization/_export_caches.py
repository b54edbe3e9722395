"""Caches of keys and values that hold quantized values, dequantized behind their updates."""

import operator
from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from coreai_opt.quantization._graph.nodes import op_type, tensor_of
from coreai_opt.quantization.config.quantization_config import KVCacheQuantConfig

__all__ = ["quantize_caches"]


def quantize_caches(model: GraphModule, configs: Mapping[str, KVCacheQuantConfig]) -> None:
    """Let the operations that update caches take and return quantized values.

    What is written into the cache is quantized as before; the cache, an input of the model, has the dtype of
    the quantized values then, and what the operation returns is dequantized.

    Args:
        model: with Core AI's operators in the place of quantizers; is changed.
        configs: by the type of the operation.

    Raises:
        NotImplementedError: an operation takes not one input of the model, or returns several tensors.
        RuntimeError: an operation's input is not quantized, or no operation has one of the types.
    """
    found = {name: [node for node in model.graph.nodes if op_type(node) == name] for name in configs}
    for name, nodes in found.items():
        if not nodes:
            raise RuntimeError(f"kv_cache_quant_configs: no operation of the model has the type {name!r}")
        for node in nodes:
            _check(node)
    for name, nodes in found.items():
        for node in nodes:
            _move_dequantization(model, node, configs[name].quant_input_idx)


def _check(node: Node) -> None:
    inputs = [each.name for each in node.all_input_nodes if each.op == "placeholder"]
    if len(inputs) != 1:
        raise NotImplementedError(
            f"kv_cache_quant_configs: {node.name!r} must take exactly one input of the model, its cache; it "
            f"takes {inputs}"
        )
    if any(user.target is operator.getitem for user in node.users):
        raise NotImplementedError(
            f"kv_cache_quant_configs: {node.name!r} returns several tensors; a cache is updated by "
            f"operations that return one"
        )


def _move_dequantization(model: GraphModule, node: Node, index: int) -> None:
    dequantized = node.all_input_nodes[index]
    quantized = dequantized.args[0] if dequantized.args else None
    operators = (torch.ops.coreai.quantize.default, torch.ops.coreai.dequantize.default)
    if not isinstance(quantized, Node) or (quantized.target, dequantized.target) != operators:
        raise RuntimeError(
            f"kv_cache_quant_configs: input {index} of {node.name!r} is not quantized: {dequantized.name!r}"
        )
    node.replace_input_with(dequantized, quantized)
    with model.graph.inserting_after(node):
        result = model.graph.call_function(
            operators[1], (node, *dequantized.args[1:]), dict(dequantized.kwargs)
        )
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    dtype = quantized.args[2]
    assert isinstance(dtype, torch.dtype)
    cache = next(each for each in node.all_input_nodes if each.op == "placeholder")
    for each in (cache, node):
        value = tensor_of(each)
        if value is not None:
            each.meta["val"] = value.to(dtype)
