"""float32 to float16: stored tensors, inputs, and each node by what it computes with."""

import math
from collections.abc import Callable
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from coreai_opt.casting._nodes import (
    CASTS,
    all_values,
    cast_result,
    cast_target,
    follow_input,
    insert_cast,
    retarget,
    set_dtype,
    tensors_of,
)
from coreai_opt.casting._stored import replace_stored_tensors, user_inputs

__all__ = ["INFINITE", "LARGEST", "SMALLEST", "cast"]

LARGEST, SMALLEST = 65504.0, 2.0**-24
# From here on a number stands for infinity.
INFINITE = 1e38

aten = torch.ops.aten

_CREATION = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.empty.memory_format,
        aten.full.default,
        aten.full_like.default,
        aten.ones.default,
        aten.ones_like.default,
        aten.rand.default,
        aten.randn.default,
        aten.scalar_tensor.default,
        aten.zeros.default,
        aten.zeros_like.default,
    }
)
_METADATA_CHECK = aten._assert_tensor_metadata.default


def cast(program: ExportedProgram, stays: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Cast the program, with a cast wherever types meet.

    Args:
        program: is changed in place.
        stays: whether a node must compute in float32.

    Returns:
        The casts that were added.
    """
    kept = {node for node in program.graph.nodes if node.op == "call_function" and stays(node)}
    replace_stored_tensors(program, _stored_as_half)
    for node in user_inputs(program):
        set_dtype(node, _half)
    inserted: set[fx.Node] = set()
    for node in list(program.graph.nodes):
        if node.op == "call_function":
            _cast_node(node, node in kept, inserted)
    return inserted


def _half(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float32 else dtype


def _stored_as_half(tensor: Tensor) -> Tensor:
    """A stored tensor in float16, or itself where it does not fit."""
    if tensor.dtype != torch.float32:
        return tensor
    magnitude = tensor.detach().abs()
    if bool(((magnitude > LARGEST) & (magnitude < INFINITE)).any()):
        return tensor
    smallest = torch.full_like(tensor, SMALLEST).copysign(tensor)
    return torch.where((magnitude > 0) & (magnitude < SMALLEST), smallest, tensor).detach().to(torch.float16)


def _cast_node(node: fx.Node, is_kept: bool, inserted: set[fx.Node]) -> None:
    if node.target is getitem:
        container = node.args[0].meta["val"]  # type: ignore[union-attr]
        node.meta["val"] = container[node.args[1]]
    elif node.target is _METADATA_CHECK:
        follow_input(node)
    elif is_kept:
        _compute_in_float32(node, inserted)
    elif node.target in CASTS:
        if cast_target(node) == torch.float32:
            retarget(node, torch.float16)
            inserted.add(node)
    elif node.target in _CREATION and _dtypes(node) == {torch.float32}:
        _create_half(node)
    elif _is_untouched(node):
        return
    elif _dtypes(*node.all_input_nodes) & {torch.float32} or _has_large_number(node):
        _compute_in_float32(node, inserted)
    else:
        _compute_in_float16(node)


def _dtypes(*nodes: fx.Node) -> set[torch.dtype]:
    """The floating-point dtypes of the nodes' results."""
    return {each.dtype for node in nodes for each in tensors_of(node) if each.dtype.is_floating_point}


def _is_untouched(node: fx.Node) -> bool:
    """Whether a node computes with nothing in float32: with integers, or in another float type throughout."""
    inputs = _dtypes(*node.all_input_nodes)
    if not inputs:
        return not any(isinstance(value, float) for value in all_values(node))
    return torch.float64 in inputs or not inputs & {torch.float16, torch.float32}


def _has_large_number(node: fx.Node) -> bool:
    return any(isinstance(value, float) and LARGEST < abs(value) < INFINITE for value in all_values(node))


def _compute_in_float32(node: fx.Node, inserted: set[fx.Node]) -> None:
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), Tensor) and source.meta["val"].dtype == torch.float16:
            wide = insert_cast(source, torch.float32, node)
            inserted.add(wide)
            node.replace_input_with(source, wide)
    result = node.meta.get("val")
    if isinstance(result, Tensor) and result.dtype.is_floating_point:
        cast_result(node, torch.float16, inserted)


def _create_half(node: fx.Node) -> None:
    if not _has_large_number(node):
        _replace_numbers(node)
        node.update_kwarg("dtype", torch.float16)
        set_dtype(node, _half)


def _compute_in_float16(node: fx.Node) -> None:
    _replace_numbers(node)
    set_dtype(node, _half)


def _replace_numbers(node: fx.Node) -> None:
    """Round the floating-point arguments to float16, and let dtype arguments name it."""
    node.args = tuple(_in_half(value) for value in node.args)
    node.kwargs = {name: _in_half(value) for name, value in node.kwargs.items()}


def _in_half(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_in_half(each) for each in value)
    if isinstance(value, torch.dtype):
        return _half(value)
    if not isinstance(value, float):
        return value
    if abs(value) >= INFINITE:
        return math.copysign(LARGEST, value)
    if 0 < abs(value) < SMALLEST:
        return math.copysign(SMALLEST, value)
    return float(np.float16(value))
