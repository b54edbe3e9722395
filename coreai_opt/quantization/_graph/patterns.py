"""Which operations are quantized, and which of them as one: tables of operators, and a registry of types."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from coreai_opt._utils.registry_utils import ClassRegistryMixin
from coreai_opt.quantization._graph.nodes import op_type, overload_name, packet_name

__all__ = ["ACTIVATION_TYPES", "BATCH_NORM", "Match", "OperationPattern", "find_matches", "in_place_too"]

BATCH_NORM = "batch_norm.default"
_CONVOLUTIONS = frozenset(
    {
        *(f"conv{axes}d.{overload}" for axes in (1, 2, 3) for overload in ("default", "padding")),
        "conv_transpose1d.default",
        "conv_transpose2d.input",
        "conv_transpose3d.input",
    }
)
_LINEAR = "linear.default"
_EMBEDDING = "embedding.default"


def in_place_too(*names: str) -> frozenset[str]:
    """``names`` of operators, and those of their forms that work in place."""
    return frozenset(names) | {f"{name}_" for name in names}


# Activations behind an operation with a weight, by aten operator.
_ACTIVATION_PACKETS = in_place_too(
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "elu",
    "celu",
    "selu",
    "mish",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
) | {"gelu", "sigmoid", "log_sigmoid", "tanh"}
_ACTIVATION_OVERLOADS = frozenset({"softmax.int"})
# Activations behind other operations, by type.
ACTIVATION_TYPES = frozenset(
    {
        "relu",
        "relu6",
        "leaky_relu",
        "silu",
        "elu",
        "celu",
        "selu",
        "mish",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "gelu",
        "sigmoid",
        "log_sigmoid",
        "tanh",
        "softmax",
    }
)


@dataclass(frozen=True)
class Match:
    """Nodes that are quantized as one operation, in the order of the graph.

    Fields:
        nodes: the operation, then what is fused behind it.
        shares: whether input and output are quantized alike.
    """

    nodes: tuple[Node, ...]
    shares: bool = False

    @property
    def primary(self) -> Node:
        """The operation that gives the match its configuration."""
        return self.nodes[0]


class OperationPattern(ClassRegistryMixin):
    """Operations without a weight of their own, by the types that :func:`nodes.op_type` gives.

    To quantize more operations, register a subclass under a key of its own.
    """

    # Names of torch functions.
    op_types: ClassVar[frozenset[str]]
    # Whether an activation behind the operation, its only user, is quantized with it.
    takes_activation: ClassVar[bool] = False
    # Whether inputs and output share one quantizer, as where values are only moved or averaged.
    shares_quantizer: ClassVar[bool] = False


@OperationPattern.register("matmul")
class _Matmul(OperationPattern):
    op_types = frozenset({"matmul"})
    takes_activation = True


@OperationPattern.register("einsum")
class _Einsum(OperationPattern):
    op_types = frozenset({"einsum"})
    takes_activation = True


@OperationPattern.register("add")
class _Add(OperationPattern):
    op_types = frozenset({"add", "add_"})
    takes_activation = True


@OperationPattern.register("mul")
class _Mul(OperationPattern):
    op_types = frozenset({"mul", "mul_"})
    takes_activation = True


@OperationPattern.register("sub")
class _Sub(OperationPattern):
    op_types = frozenset({"sub", "sub_", "isub"})


@OperationPattern.register("flatten")
class _Flatten(OperationPattern):
    op_types = frozenset({"flatten"})
    shares_quantizer = True


@OperationPattern.register("maxpool")
class _MaxPool(OperationPattern):
    op_types = frozenset({"max_pool1d", "max_pool2d", "max_pool3d"})
    shares_quantizer = True


@OperationPattern.register("avgpool")
class _AvgPool(OperationPattern):
    op_types = frozenset(
        {
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "adaptive_avg_pool3d",
            "mean",
        }
    )
    shares_quantizer = True


@OperationPattern.register("concat")
class _Concat(OperationPattern):
    op_types = frozenset({"cat", "concat"})
    shares_quantizer = True


def find_matches(graph: Graph, more_types: frozenset[str] = frozenset()) -> list[Match]:
    """The longest match of each operation, in the order of the graph.

    Args:
        graph: exported, with whole aten operators.
        more_types: of operations that are quantized by themselves, as if there were a pattern for them.
    """
    by_type: dict[str, type[OperationPattern]] = {}
    for pattern in OperationPattern.list_registry_values():
        by_type.update(dict.fromkeys(pattern.op_types, pattern))
    matches = []
    for node in graph.nodes:
        weighted = _weighted(node)
        if weighted is not None:
            matches.append(Match(weighted))
            continue
        kind = op_type(node)
        found = by_type.get(kind) if kind is not None else None
        if found is not None:
            behind = _only_user(node) if found.takes_activation else None
            fused = behind is not None and op_type(behind) in ACTIVATION_TYPES
            nodes = (node, behind) if fused and behind is not None else (node,)
            matches.append(Match(nodes, found.shares_quantizer))
        elif kind in more_types:
            matches.append(Match((node,)))
    return matches


def _weighted(node: Node) -> tuple[Node, ...] | None:
    name = overload_name(node)
    if name == _EMBEDDING:
        return (node,) if _distinct((node,)) else None
    if name != _LINEAR and name not in _CONVOLUTIONS:
        return None
    chain = [node]
    behind = _only_user(node)
    if behind is not None and overload_name(behind) == BATCH_NORM and behind.args[0] is node:
        chain.append(behind)
        behind = _only_user(behind)
    if behind is not None and _is_activation(behind) and behind.args[0] is chain[-1]:
        chain.append(behind)
    # The longest chain whose operands are different tensors.
    for end in range(len(chain), 0, -1):
        if _distinct(chain[:end]):
            return tuple(chain[:end])
    return None


def _is_activation(node: Node) -> bool:
    return packet_name(node) in _ACTIVATION_PACKETS or overload_name(node) in _ACTIVATION_OVERLOADS


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _distinct(chain: tuple[Node, ...] | list[Node]) -> bool:
    """Whether no tensor is two operands."""
    operands = [
        argument
        for node in chain
        for argument in (*node.args, *node.kwargs.values())
        if isinstance(argument, Node) and argument not in chain
    ]
    return len(operands) == len(set(operands))
