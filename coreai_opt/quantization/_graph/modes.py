"""Dropouts and batch norms that follow the graph module's ``training`` flag.

torch.export writes the mode of the model into the operators' arguments. Here these arguments become a node
that reads ``self.training``, so that ``train()`` and ``eval()`` work as on any module, on copies and compiled
too.
"""

import operator
from typing import Any

from torch.fx import Graph, Node

from coreai_opt.quantization._graph.nodes import overload_name
from coreai_opt.quantization._graph.patterns import BATCH_NORM

__all__ = ["batch_norm_arguments", "follow_training_flag", "is_mode_node", "use_upstream_numbers"]

_ATTRIBUTE = "training"
# Position of the argument that says whether the operator works as in training.
_FLAG_POSITIONS: dict[str, int] = {
    BATCH_NORM: 5,
    "dropout.default": 2,
    "dropout_.default": 2,
    "feature_dropout.default": 2,
    "feature_dropout_.default": 2,
    "alpha_dropout.default": 2,
    "alpha_dropout_.default": 2,
    "feature_alpha_dropout.default": 2,
    "feature_alpha_dropout_.default": 2,
    "rrelu.default": 3,
    "rrelu_.default": 3,
    "instance_norm.default": 5,
    "lstm.input": 6,
    "gru.input": 6,
    "rnn_tanh.input": 6,
    "rnn_relu.input": 6,
}
# Its dropout has a probability and no flag.
_ATTENTION = "scaled_dot_product_attention.default"
# Normalizations that work on the batch alone have no running statistics, in either mode.
_RUNNING_MEAN_POSITION = {BATCH_NORM: 3, "instance_norm.default": 3}
# What the exported graph of Apple's package does not switch.
_SWITCHED_UPSTREAM = frozenset({BATCH_NORM, "dropout.default", "dropout_.default"})
_UPSTREAM_MOMENTUM, _UPSTREAM_EPS, _UPSTREAM_P = 0.1, 1e-5, 0.5
_BATCH_NORM_DEFAULTS = (None, None, None, None, None, False, 0.1, 1e-5, True)


def is_mode_node(node: Node) -> bool:
    """Whether the node reads the graph module's ``training``."""
    return node.op == "get_attr" and node.target == _ATTRIBUTE


def batch_norm_arguments(node: Node) -> tuple[Any, ...]:
    """The operator's arguments, those that are left out included."""
    return (*node.args, *_BATCH_NORM_DEFAULTS[len(node.args) :])


def follow_training_flag(graph: Graph, strict_upstream: bool = False) -> None:
    """Let all operators that work differently in training follow the graph module's flag.

    Args:
        graph: is changed.
        strict_upstream: switch dropout and batch norm alone.
    """
    nodes = list(graph.nodes)
    flags: list[Node] = []

    def flag() -> Node:
        if not flags:
            first = next(node for node in nodes if node.op not in ("placeholder", "get_attr"))
            with graph.inserting_before(first):
                flags.append(graph.create_node("get_attr", _ATTRIBUTE))
        return flags[0]

    for node in nodes:
        position = _switchable(node, strict_upstream)
        if position is not None:
            node.update_arg(position, flag())
        elif overload_name(node) == _ATTENTION and not strict_upstream and _attention_dropout(node):
            with graph.inserting_before(node):
                # The probability in training, zero in evaluation: a bool times a number.
                p = graph.call_function(operator.mul, (flag(), _attention_dropout(node)))
            _set_attention_dropout(node, p)


def _attention_dropout(node: Node) -> float:
    if "dropout_p" in node.kwargs:
        return float(node.kwargs["dropout_p"])  # type: ignore[arg-type]
    return float(node.args[4]) if len(node.args) > 4 else 0.0  # type: ignore[arg-type]


def _set_attention_dropout(node: Node, p: Node) -> None:
    if "dropout_p" in node.kwargs:
        node.update_kwarg("dropout_p", p)
    else:
        node.update_arg(4, p)


def _switchable(node: Node, strict_upstream: bool) -> int | None:
    name = overload_name(node)
    position = _FLAG_POSITIONS.get(name)
    if position is None or position >= len(node.args) or (strict_upstream and name not in _SWITCHED_UPSTREAM):
        return None
    mean = _RUNNING_MEAN_POSITION.get(name)
    return None if mean is not None and node.args[mean] is None else position


def use_upstream_numbers(graph: Graph) -> None:
    """Give batch norms and dropouts the numbers that they have in Apple's package, whatever the model's."""
    for node in graph.nodes:
        name = overload_name(node)
        if name == BATCH_NORM:
            node.args = (*batch_norm_arguments(node)[:6], _UPSTREAM_MOMENTUM, _UPSTREAM_EPS, *node.args[8:])
        elif name in ("dropout.default", "dropout_.default"):
            node.update_arg(1, _UPSTREAM_P)
