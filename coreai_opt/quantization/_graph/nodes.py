"""What a node of an exported graph is: its type of operation, its module, its tensor."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = [
    "attribute_of",
    "is_quantizable",
    "is_state",
    "module_stack",
    "op_type",
    "overload_name",
    "packet_name",
    "tensor_of",
]

# Operators that stand for a compressed parameter or buffer.
_COMPRESSED_STATES = frozenset(
    {
        "constexpr_blockwise_shift_scale",
        "lut_to_dense",
        "sparse_to_dense",
        "sparse_with_bitmask_to_dense",
    }
)
_COMPRESSED_NAMESPACE = "coreai"


def op_type(node: Node) -> str | None:
    """The name of the torch function that the model called, e.g. ``"linear"``; None for other nodes.

    All nodes inside a function that torch builds of several operators have the function's name.
    """
    if node.op != "call_function":
        return None
    function = node.meta.get("torch_fn")
    if function is None:
        return None
    return str(function[1]).partition(".")[2] or None


def overload_name(node: Node) -> str:
    """The aten operator and its overload, e.g. ``"conv2d.default"``; empty for other nodes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return f"{target._schema.name.partition('::')[2]}.{target._overloadname}"


def packet_name(node: Node) -> str:
    """The aten operator without its overload, e.g. ``"transpose"``; empty for other nodes."""
    return overload_name(node).partition(".")[0]


def is_state(node: Node) -> bool:
    """Whether the node stands for a parameter, a buffer or a constant, compressed ones included."""
    if node.op == "get_attr":
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == _COMPRESSED_NAMESPACE
        and target._schema.name.partition("::")[2] in _COMPRESSED_STATES
    )


def tensor_of(node: Node) -> Tensor | None:
    """The tensor that the node had in the export, without data; None if its value is none."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_quantizable(node: Node) -> bool:
    """Whether the node's value is a floating-point tensor that may have several elements."""
    tensor = tensor_of(node)
    if tensor is None or not tensor.is_floating_point():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a second: it imports sympy

    return not statically_known_true(tensor.numel() <= 1)


def module_stack(node: Node) -> Iterator[str]:
    """Names of the modules whose forward runs the node, the outermost one, the model itself, first."""
    for name, _ in (node.meta.get("nn_module_stack") or {}).values():
        # A module's second call is marked by "@1".
        yield re.sub(r"@\d+", "", str(name))


def attribute_of(model: GraphModule, node: Node) -> object:
    """What a get_attr node reads."""
    found: object = model
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found
