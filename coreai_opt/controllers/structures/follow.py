"""Follows a model's program: from the exported graph to the :class:`.trace.State` of its channels."""

import operator
from typing import Any

from torch import nn

from coreai_opt.controllers.structures.layer_operations import LAYER_OPERATIONS
from coreai_opt.controllers.structures.operations import OPERATIONS
from coreai_opt.controllers.structures.program import exported
from coreai_opt.controllers.structures.trace import State

__all__ = ["follow"]


def follow(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], only_zero: bool = True) -> State:
    """What a forward of the model does with the outputs of its convolutions and linear layers.

    Args:
        model: the uncompressed model; it stays as it is.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.
        only_zero: let entries stay that are not zero, once masked, where a layer reads them.

    Raises:
        ValueError: the model cannot be exported.
    """
    plain, program = exported(model, args, kwargs)
    signature = program.graph_signature
    state = State(
        plain, {**signature.inputs_to_parameters, **signature.inputs_to_buffers}, only_zero=only_zero
    )
    inputs = set(signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in inputs:
            state.from_input.add(node)
            state.activations.add(node)
        elif node.op == "call_function":
            if not state.activations.isdisjoint(node.all_input_nodes):
                state.activations.add(node)
            _visit(state, node)
        elif node.op == "output":
            state.fix(node.all_input_nodes, "they are outputs of the model")
    return state


def _visit(state: State, node: Any) -> None:
    name = _name(node)
    if not node.users:
        return
    layer = LAYER_OPERATIONS.get(name)
    if layer is None and any(each in state.from_input for each in node.all_input_nodes):
        state.from_input.add(node)
    tracked = [each for each in node.all_input_nodes if each in state.values]
    if layer is None and not tracked:
        return
    schema = getattr(node.target, "_schema", None)
    if schema is not None and not schema.returns:  # an assertion
        return
    if schema is None and node.target is not operator.getitem:
        return  # arithmetic on sizes
    behaviour = layer or OPERATIONS.get(name)
    value = behaviour(state, node) if behaviour is not None else None
    if value is not None:
        state.values[node] = value
    elif layer is None or name not in _READERS:
        state.fix(tracked, f"{name} mixes them")


# Those say themselves what of their input has to stay.
_READERS = {"linear", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))}


def _name(node: Any) -> str:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(getattr(node.target, "__name__", ""))
    name = str(schema.name).rpartition("::")[2]
    return name.removesuffix("_")
