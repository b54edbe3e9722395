"""The records of an exported graph: one for each node."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from coreai_opt.inspection._tree import build_tree, qualified_type
from coreai_opt.inspection.types import (
    BoundaryEdge,
    InputEdge,
    ModuleContext,
    ModuleInfo,
    OpInfo,
    SourceFrame,
)

__all__ = ["export_graph", "inspect_graph", "quantizable_nodes"]

aten = torch.ops.aten

# Operations that a quantizer recognizes by what the node calls, whatever function called it...
_WEIGHTED_OPS = frozenset(
    {
        aten.linear.default,
        aten.embedding.default,
        *(getattr(aten, f"conv{n}d").default for n in (1, 2, 3)),
        *(getattr(aten, f"conv{n}d").padding for n in (1, 2, 3)),
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
    }
)
# ... and by the function that the model calls.
_QUANTIZABLE_TYPES = frozenset(
    {
        *("matmul", "einsum", "add", "add_", "mul", "mul_", "sub", "sub_", "isub"),
        *("flatten", "mean", "cat", "concat"),
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)),
    }
)

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n?(?P<code>[^\n]*)')
_INDEX = re.compile(r"\[['\"]?([^\]'\"]*)['\"]?\]")
_ROOT_PREFIX = re.compile(r"^(L__self__|L\.self|L_self|self)(\.|$)")
_REPEATED_CALL = re.compile(r"@\d+")


def export_graph(
    model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any, with_no_grad: bool
) -> fx.GraphModule:
    """``torch.export`` of the model, as a module.

    Raises:
        RuntimeError: torch cannot export it; the cause is chained.
    """
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not with_no_grad):
            program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
        return program.module(check_guards=False)
    except Exception as error:
        # What can go wrong in a trace of user code has no common base.
        raise RuntimeError(
            f"torch.export cannot trace {type(model).__name__}: {error}. execution_mode='eager' "
            f"needs no export"
        ) from error


def inspect_graph(graph: fx.GraphModule, root_type: type, is_listed: Callable[[fx.Node], bool]) -> ModuleInfo:
    """The modules of a graph with the nodes that they run.

    Args:
        graph: is read, not run.
        root_type: the class of the model, where the graph does not say.
        is_listed: whether to list a node among the operations of its module.
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
    listed = {record for node, record in running.items() if is_listed(node)}
    for module in modules.values():
        module.ops = [op for op in module.ops if op in listed]
    return modules[root.module_name]


def quantizable_nodes(node: fx.Node) -> bool:
    """Whether a graph-mode quantizer has a pattern that starts with ``node``."""
    return node.target in _WEIGHTED_OPS or _op_type(node) in _QUANTIZABLE_TYPES


def _record(node: fx.Node, root: ModuleContext, records: Mapping[fx.Node, OpInfo]) -> OpInfo:
    is_state = node.op == "get_attr"
    return OpInfo(
        op_name=str(node.target) if is_state else node.name,
        op_type=_op_type(node),
        module_stack=_module_stack(node, root),
        source_frames=_frames(node.meta.get("stack_trace") or ""),
        inputs=tuple(InputEdge(records[producer], 0) for producer in node.all_input_nodes),
        outputs={},
        is_state=is_state,
    )


def _op_type(node: fx.Node) -> str | None:
    torch_fn = node.meta.get("torch_fn")
    return str(torch_fn[1]).partition(".")[2] if torch_fn else None


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
