"""int32 and int64 to int16, where inputs are added, subtracted and multiplied."""

from collections.abc import Callable, Iterable

import torch
from torch import fx
from torch.export import ExportedProgram

from coreai_opt.casting._nodes import (
    CASTS,
    cast_result,
    cast_target,
    dtype_of,
    follow_input,
    insert_cast,
    retarget,
    set_dtype,
)
from coreai_opt.casting._stored import user_inputs

__all__ = ["anchor_views", "cast"]

aten = torch.ops.aten

_ARITHMETIC = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor})
# Operations that take indices, and the position of the indices.
_INDEX_ARGUMENTS = {
    aten.embedding.default: 1,
    aten.take_along_dim.default: 1,
    aten.gather.default: 2,
    aten.index_select.default: 2,
    aten.scatter.src: 2,
    aten.scatter.value: 2,
    aten.scatter_add.default: 2,
    aten.scatter_reduce.two: 2,
    aten.index_copy.default: 2,
    aten.index_add.default: 2,
    aten.index_fill.int_Scalar: 2,
    aten.index_fill.int_Tensor: 2,
    aten.index.Tensor: 1,
    aten.index_put.default: 1,
    aten.index_put_.default: 1,
}
_RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.select.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.narrow.default,
        aten._unsafe_view.default,
    }
)
_WIDE = (torch.int32, torch.int64)
_INTEGERS = (torch.int16, *_WIDE)


def cast(program: ExportedProgram) -> set[fx.Node]:
    """Cast what can be cast, with a cast wherever types meet.

    Returns:
        The casts that were added.
    """
    graph = program.graph
    for node in graph.nodes:
        if cast_target(node) == torch.int16:
            retarget(node, torch.int32)
    inputs = list(user_inputs(program))
    # Whatever an index is computed from keeps its type.
    indices = _reached(_index_nodes(graph), lambda node: node.all_input_nodes)
    castable = _castable(graph, _reached(inputs, lambda node: node.users), indices)
    for node in inputs:
        if node in castable:
            set_dtype(node, lambda _: torch.int16)
    inserted: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "call_function" and node in castable and node.target not in CASTS:
            _compute_in_int16(node, castable, indices, inserted)
        elif node.target is aten._assert_tensor_metadata.default:
            follow_input(node)
    return inserted


def anchor_views(graph: fx.Graph) -> None:
    """Put casts to int16 in front of views of computed int16 tensors: they keep the type in later passes."""
    for node in list(graph.nodes):
        if node.target not in _RESHAPES:
            continue
        source = node.args[0]
        if dtype_of(source) == torch.int16 and source.op != "placeholder" and not _is_view_or_cast(source):
            anchor = insert_cast(source, torch.int16, node, f"{source.name}_to_int16_anchor")
            node.replace_input_with(source, anchor)


def _is_view_or_cast(node: fx.Node) -> bool:
    return node.target in _RESHAPES or node.target in CASTS


def _index_nodes(graph: fx.Graph) -> list[fx.Node]:
    found: list[fx.Node] = []
    for node in graph.nodes:
        position = _INDEX_ARGUMENTS.get(node.target) if node.op == "call_function" else None
        if position is not None and len(node.args) > position:
            argument = node.args[position]
            values = argument if isinstance(argument, list | tuple) else [argument]
            found.extend(value for value in values if isinstance(value, fx.Node))
    return found


def _reached(nodes: Iterable[fx.Node], next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes, those next to them, and so on."""
    found, pending = set(nodes), list(nodes)
    while pending:
        for node in next_to(pending.pop()):
            if node not in found:
                found.add(node)
                pending.append(node)
    return found


def _is_integer(node: fx.Node) -> bool:
    return dtype_of(node) in _INTEGERS


def _has_two_tensors(node: fx.Node) -> bool:
    return all(isinstance(operand, fx.Node) for operand in node.args[:2])


def _castable(graph: fx.Graph, reachable: set[fx.Node], indices: set[fx.Node]) -> set[fx.Node]:
    """Arithmetic on what the inputs lead to, and the integers around it."""

    def may_join(node: fx.Node) -> bool:
        with_number = node.target in _ARITHMETIC and not _has_two_tensors(node)
        return node in reachable and node not in indices and _is_integer(node) and not with_number

    found = {
        node
        for node in graph.nodes
        if node.target in _ARITHMETIC
        and _has_two_tensors(node)
        and node in reachable
        and node not in indices
        and (_is_integer(node) or any(_is_integer(source) for source in node.all_input_nodes))
    }
    return _reached(
        found, lambda node: [each for each in (*node.all_input_nodes, *node.users) if may_join(each)]
    )


def _compute_in_int16(
    node: fx.Node, castable: set[fx.Node], indices: set[fx.Node], inserted: set[fx.Node]
) -> None:
    for source in node.all_input_nodes:
        is_foreign_input = source.op == "placeholder" and source not in castable
        if dtype_of(source) in _WIDE and source not in indices and not is_foreign_input:
            narrow = insert_cast(source, torch.int16, node)
            inserted.add(narrow)
            node.replace_input_with(source, narrow)
    if _is_integer(node) and any(dtype_of(source) == torch.int16 for source in node.all_input_nodes):
        set_dtype(node, lambda _: torch.int16)
        cast_result(node, torch.int32, inserted)
