"""Graph modules that can be copied and saved whole.

A plain :class:`torch.fx.GraphModule` is pickled as its code, and loading traces that code anew: what nodes
know is lost, ``self.training`` becomes a constant, and the tracer of torch.export cannot be constructed at
all. Here the nodes themselves are written.
"""

import copy
import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from coreai_opt.quantization._graph.attributes import KEPT_METADATA

__all__ = ["QuantizedGraphModule"]

# What the constructor of a graph module makes of the graph; "meta" has what is ours, too.
_DERIVED = vars(GraphModule(nn.Module(), Graph())).keys() - vars(nn.Module()).keys() - {"meta"}
# Of nodes: what later stages, exports and inspection read, and what this package writes.
_NODE_METADATA = ("nn_module_stack", "torch_fn", "stack_trace")
_OWN_PREFIX = "coreai_opt_"


class QuantizedGraphModule(GraphModule):
    """What graph mode prepares and finalizes: copies and pickles are as it is.

    ``torch.save(prepared, path)`` and ``torch.load(path, weights_only=False)`` work, too. As with any whole
    model, the file belongs to the versions of the packages that wrote it; states are for keeping.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedGraphModule":
        # Known before it is filled: hooks refer to the module that they are on.
        result = memo[id(self)] = _empty()
        result._fill(copy.deepcopy(_attributes(self), memo) | _structures(self), copied(self.graph))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        state = {
            "attributes": _attributes(self),
            "nodes": [_written(node) for node in self.graph.nodes],
            # As bytes: reading torch's tree specifications gives a warning, about torch itself.
            "structures": pickle.dumps((self.graph._codegen, _structures(self))),
        }
        return _empty, (), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        graph = _read(state["nodes"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            codegen, structures = pickle.loads(state["structures"])
        graph.set_codegen(codegen)
        self._fill(state["attributes"] | structures, graph)

    def _fill(self, attributes: dict[str, Any], graph: Graph) -> None:
        # All of them, not what the constructor would take, in the order of the graph: the order of parameters
        # is that of an optimizer's state.
        vars(self).update(attributes)
        self.graph = graph


def _empty() -> QuantizedGraphModule:
    return QuantizedGraphModule(nn.Module(), Graph())


def copied(graph: Graph) -> Graph:
    """A graph of its own, with the same form of inputs and outputs."""
    found = Graph()
    nodes: dict[Node, Node] = {}
    found.output(found.graph_copy(graph, nodes))
    # A deep copy of it would give a warning, in torch 2.13.
    found.set_codegen(graph._codegen)
    return found


def _attributes(model: GraphModule) -> dict[str, Any]:
    """All that belongs to the module and not to its graph, the structures of its inputs and outputs aside."""
    others = _DERIVED | _structures(model).keys()
    found = {name: value for name, value in vars(model).items() if name not in others}
    found["meta"] = {name: model.meta[name] for name in KEPT_METADATA if name in model.meta}
    # The branches of torch.cond and the like.
    found["_modules"] = {
        name: _with_nodes(module) if isinstance(module, GraphModule) else module
        for name, module in model._modules.items()
    }
    return found


def _structures(model: GraphModule) -> dict[str, pytree.TreeSpec]:
    return {name: value for name, value in vars(model).items() if isinstance(value, pytree.TreeSpec)}


def _with_nodes(module: GraphModule) -> "QuantizedGraphModule":
    return module if isinstance(module, QuantizedGraphModule) else QuantizedGraphModule(module, module.graph)


@dataclass(frozen=True)
class _Reference:
    """A node, by its name."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """What pickle cannot write: an operator below ``torch.ops``, by its name there."""

    name: str

    @staticmethod
    def name_of(target: Any) -> str | None:
        if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return str(target)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return f"higher_order.{target.name()}"
        return None

    def find(self) -> Any:
        found: Any = torch.ops
        for part in self.name.split("."):
            try:
                found = getattr(found, part)
            except AttributeError as error:
                raise RuntimeError(
                    f"the saved graph calls torch.ops.{self.name}, which is not registered here: "
                    f"import the package that registers it, then load"
                ) from error
        return found


def _written(node: Node) -> dict[str, Any]:
    name = _Operator.name_of(node.target)

    def reference(each: Node) -> Any:
        return _Reference(each.name)

    return {
        "op": node.op,
        "name": node.name,
        "target": node.target if name is None else _Operator(name),
        "args": map_arg(node.args, reference),
        "kwargs": map_arg(node.kwargs, reference),
        "type": node.type,
        "meta": _written_metadata(node),
    }


def _written_metadata(node: Node) -> dict[str, Any]:
    found = {name: node.meta[name] for name in _NODE_METADATA if name in node.meta}
    found |= {name: value for name, value in node.meta.items() if name.startswith(_OWN_PREFIX)}
    if found.get("nn_module_stack"):
        # Classes by their names: those of a local scope cannot be pickled.
        found["nn_module_stack"] = {
            key: (path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
            for key, (path, kind) in found["nn_module_stack"].items()
        }
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        found["val"] = ([_example(size) for size in value.shape], value.dtype)
    return found


def _example(size: int | torch.SymInt) -> int:
    """The size that the example inputs gave."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _read(written: list[dict[str, Any]]) -> Graph:
    graph = Graph()
    nodes: dict[str, Node] = {}

    def argument(value: Any) -> Any:
        return pytree.tree_map_only(_Reference, lambda each: nodes[each.name], value)

    for each in written:
        target = each["target"].find() if isinstance(each["target"], _Operator) else each["target"]
        node = graph.create_node(
            each["op"], target, argument(each["args"]), argument(each["kwargs"]), each["name"], each["type"]
        )
        node.meta = each["meta"]
        if "val" in node.meta:
            shape, dtype = node.meta["val"]
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        nodes[each["name"]] = node
    return graph
