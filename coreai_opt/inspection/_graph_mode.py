"""The records of an exported graph: one for each node."""

import re
from collections.abc import Collection, Mapping

from torch import fx

from coreai_opt.inspection._tree import build_tree, qualified_type
from coreai_opt.inspection.types import (
    BoundaryEdge,
    InputEdge,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)
from coreai_opt.quantization._graph.nodes import op_type
from coreai_opt.quantization._graph.patterns import find_matches

__all__ = ["inspect_graph", "quantizable_nodes"]

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n?(?P<code>[^\n]*)')
_INDEX = re.compile(r"\[['\"]?([^\]'\"]*)['\"]?\]")
_ROOT_PREFIX = re.compile(r"^(L__self__|L\.self|L_self|self)(\.|$)")
_REPEATED_CALL = re.compile(r"@\d+")


def inspect_graph(graph: fx.GraphModule, root_type: type, listed: Collection[fx.Node] | None) -> ModuleInfo:
    """The modules of a graph with the nodes that they run.

    Args:
        graph: is read, not run.
        root_type: the class of the model, where the graph does not say.
        listed: the nodes to list among the operations of their modules; None for all.
    """
    root = ModuleContext("", qualified_type(root_type))
    records: dict[fx.Node, OpInfo] = {}
    for node in graph.graph.nodes:
        records[node] = _record(node, root, records)
    for node, record in records.items():
        record.outputs = {0: tuple(records[user] for user in node.users)}
    running = {
        node: record for node, record in records.items() if record.module_stack and not record.is_state
    }
    if running:
        root = next(iter(running.values())).module_stack[0]
    modules = build_tree(root, running.values())
    _mark_boundaries(modules, running)
    if listed is not None:
        kept = {record for node, record in running.items() if node in listed}
        for module in modules.values():
            module.ops = [op for op in module.ops if op in kept]
    return modules[root.module_name]


def quantizable_nodes(graph: fx.GraphModule) -> set[fx.Node]:
    """The operations that a graph-mode quantizer knows; of those that it fuses, the first."""
    return {match.primary for match in find_matches(graph.graph)}


def _record(node: fx.Node, root: ModuleContext, records: Mapping[fx.Node, OpInfo]) -> OpInfo:
    is_state = node.op == "get_attr"
    return OpInfo(
        op_name=str(node.target) if is_state else node.name,
        op_type=op_type(node),
        module_stack=_module_stack(node, root),
        source_frames=_frames(node.meta.get("stack_trace") or ""),
        inputs=tuple(InputEdge(records[producer], 0) for producer in node.all_input_nodes),
        outputs={},
        is_state=is_state,
    )


def _module_stack(node: fx.Node, root: ModuleContext) -> tuple[ModuleContext, ...]:
    """The modules around a node. Graphs that torch.fx traced leave the root out."""
    contexts = [
        ModuleContext(_module_name(path), kind if isinstance(kind, str) else qualified_type(kind))
        for path, kind in (node.meta.get("nn_module_stack") or {}).values()
    ]
    if contexts and contexts[0].module_name:
        contexts.insert(0, root)
    return tuple(contexts)


def _module_name(path: str) -> str:
    """The name as in ``named_modules`` of a path such as ``L['self'].layers[0]`` or ``block@1``."""
    dotted = _INDEX.sub(r".\1", _REPEATED_CALL.sub("", path))
    return _ROOT_PREFIX.sub("", dotted)


def _frames(stack_trace: str) -> tuple[SourceFrame, ...]:
    return tuple(
        SourceFrame(found["file"], int(found["line"]), found["function"], found["code"].strip())
        for found in _FRAME.finditer(stack_trace)
        if found["function"] == "forward"
    )


def _mark_boundaries(modules: Mapping[str, ModuleInfo], running: Mapping[fx.Node, OpInfo]) -> None:
    """Number the tensors that enter and leave each module, in the order of the nodes."""
    inside = {record: {context.module_name for context in record.module_stack} for record in running.values()}
    nowhere: set[str] = set()
    for record in running.values():
        for slot, edge in enumerate(record.inputs):
            if edge.is_state:
                continue
            for name in inside[record] - inside.get(edge.op, nowhere):
                inputs = modules[name].input_ops
                inputs[len(inputs)] = [BoundaryEdge(record, slot)]
        users = record.outputs[0]
        for name in inside[record]:
            if any(name not in inside.get(user, nowhere) for user in users):
                outputs = modules[name].output_ops
                outputs[len(outputs)] = BoundaryEdge(record, 0)
