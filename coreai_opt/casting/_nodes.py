"""Dtypes of nodes, and nodes that change them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "CASTS",
    "all_values",
    "cast_result",
    "cast_target",
    "dtype_of",
    "follow_input",
    "insert_cast",
    "retarget",
    "set_dtype",
    "tensors_of",
]

aten = torch.ops.aten

# Operations that change the dtype, and the position of the dtype where it is no keyword.
CASTS: dict[Any, int | None] = {aten._to_copy.default: None, aten.to.dtype: 1, aten.to.dtype_layout: None}


def tensors_of(node: fx.Node) -> tuple[Tensor, ...]:
    """The fake tensors that a node results in."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(each for each in values if isinstance(each, Tensor))


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node that results in one tensor; None for others."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def all_values(node: fx.Node) -> Iterator[Any]:
    """The arguments of a node, those in lists included."""
    pending = [*node.kwargs.values(), *reversed(node.args)]
    while pending:
        value = pending.pop()
        if isinstance(value, list | tuple):
            pending.extend(reversed(value))
        else:
            yield value


def set_dtype(node: fx.Node, change: Callable[[torch.dtype], torch.dtype]) -> None:
    """Give the tensors that a node results in another dtype, in its metadata."""
    value = node.meta.get("val")

    def changed(each: Any) -> Any:
        if isinstance(each, Tensor) and change(each.dtype) != each.dtype:
            return each.to(change(each.dtype))
        return each

    if isinstance(value, list | tuple):
        node.meta["val"] = type(value)(changed(each) for each in value)
    else:
        node.meta["val"] = changed(value)
    node.meta.pop("tensor_meta", None)


def cast_target(node: fx.Node) -> torch.dtype | None:
    """The dtype that a cast casts to; None for other nodes, and for copies that change no dtype."""
    if node.op != "call_function" or node.target not in CASTS:
        return None
    position = CASTS[node.target]
    if position is not None and len(node.args) > position:
        return node.args[position]  # type: ignore[return-value]
    return node.kwargs.get("dtype")  # type: ignore[return-value]


def retarget(node: fx.Node, dtype: torch.dtype) -> None:
    """Let a cast cast to another dtype."""
    position = CASTS[node.target]
    if position is not None and len(node.args) > position:
        node.update_arg(position, dtype)
    else:
        node.update_kwarg("dtype", dtype)
    set_dtype(node, lambda _: dtype)


def insert_cast(source: fx.Node, dtype: torch.dtype, before: fx.Node, name: str | None = None) -> fx.Node:
    """A cast of ``source`` to ``dtype`` in front of the node ``before``."""
    graph = source.graph
    with graph.inserting_before(before):
        node = graph.create_node(
            "call_function",
            aten._to_copy.default,
            (source,),
            {"dtype": dtype},
            name=name or f"{source.name}_to_{str(dtype).replace('.', '_')}",
        )
    for key in ("nn_module_stack", "stack_trace"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    node.meta["val"] = source.meta["val"]
    set_dtype(node, lambda _: dtype)
    return node


def cast_result(node: fx.Node, dtype: torch.dtype, inserted: set[fx.Node]) -> None:
    """Let all that reads a node read a cast of it, which stands in front of the first reader."""
    users = list(node.users)
    if users:
        cast = insert_cast(node, dtype, min(users))
        inserted.add(cast)
        for user in users:
            user.replace_input_with(node, cast)


def follow_input(check: fx.Node) -> None:
    """Let a check of metadata expect the dtype that its input has now."""
    expected = tensors_of(check.args[0])[0].dtype  # type: ignore[arg-type]
    if len(check.args) > 3:
        check.update_arg(3, expected)
        check.kwargs = {name: value for name, value in check.kwargs.items() if name != "dtype"}
    elif "dtype" in check.kwargs:
        check.update_kwarg("dtype", expected)
