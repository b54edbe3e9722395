"""What layers with parameters do to channels: they make, read or follow them."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from coreai_opt.controllers.core.layers import CONVOLUTIONS
from coreai_opt.controllers.structures.trace import Call, Segment, State, Value, argument, dim_of, shape_of

__all__ = ["LAYER_OPERATIONS"]

_PAIR = 2  # a multiplication with an addition


def _parameter(state: State, node: Any) -> Any:
    """The parameter or buffer that a node is; None if it is something else."""
    name = state.tensors.get(getattr(node, "name", ""))
    if name is None:
        return None
    owner, _, attribute = name.rpartition(".")
    return getattr(state.model.get_submodule(owner), attribute)


def _owner(state: State, node: Any, types: tuple[type[nn.Module], ...]) -> tuple[str, Any] | None:
    """The layer of ``types`` whose parameter or buffer a node is, and its name."""
    name = state.tensors.get(getattr(node, "name", ""))
    if name is None:
        return None
    layer = name.rpartition(".")[0]
    module = state.model.get_submodule(layer)
    return (layer, module) if isinstance(module, types) else None


def _serves_layers_alone(node: Any, uses: tuple[str, ...]) -> bool:
    """Whether a parameter is read by operations of these names only."""
    return all(
        user.op == "call_function"
        and getattr(user.target, "_schema", None) is not None
        and user.target._schema.name.removeprefix("aten::") in uses
        for user in node.users
    )


def _again(state: State, key: int, value: Value | None) -> tuple[Value | None, Value | None] | None:
    """Input and output of a weight's first call, the former united with this one's; None at first."""
    if key not in state.by_tensor:
        return None
    before, output = state.by_tensor[key]
    alike = before is not None and value is not None and before.entries == value.entries
    if before is not None and value is not None and alike and state.unite(before, value):
        return before, output
    for each in (before, value):
        if each is not None:
            state.fix_value(each, "a layer that runs several times reads them beside others")
    return before, output


def _layers(state: State, node: Any, types: tuple[type[nn.Module], ...]) -> list[str]:
    """The layers whose weight, and bias, an operation uses: several, if they share both or have no bias."""
    weight, bias = _parameter(state, node.args[1]), argument(node, 2, "bias")
    if weight is None or (bias is not None and _parameter(state, bias) is None):
        return []
    own_bias = None if bias is None else _parameter(state, bias)
    return [
        name
        for name, module in state.model.named_modules()
        if isinstance(module, types) and module.weight is weight and module.bias is own_bias
    ]


def _connect(
    state: State,
    node: Any,
    types: tuple[type[nn.Module], ...],
    axis: int,
    outputs: int,
    coefficient: int,
) -> Value | None:
    """A layer that reads all entries of its input for each entry of its output."""
    value = state.values.get(node.args[0])
    layers = _layers(state, node, types)
    inputs = shape_of(node.args[0])[axis if axis >= 0 else axis + dim_of(node.args[0])]
    if not layers:
        state.fix([node.args[0]], "a function reads them with a weight that is no layer's")
        state.calls.append(Call("", coefficient, None, None, outputs, inputs))
        return None
    layer = layers[0]
    if value is not None and value.axis != axis % dim_of(node.args[0]):
        state.fix_value(value, f"{layer!r} reads them along another axis")
        value = None
    elif value is not None and state.only_zero and not value.zero:
        state.fix_value(value, f"a masked one is not zero where {layer!r} reads it")
    key = id(_parameter(state, node.args[1]))
    again = _again(state, key, value)
    if again is None:
        source = state.source(outputs)
        output = Value(axis % dim_of(node), (Segment(source, outputs),))
        state.by_tensor[key] = value, output
    else:
        assert again[1] is not None  # such layers have an output
        source, output = again[1].segments[0].source, again[1]
    names = ("linear", "addmm", *(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)))
    if not all(_serves_layers_alone(each, names) for each in node.args[1:3] if hasattr(each, "users")):
        state.fixed.setdefault(source, f"the weight of {layer!r} is used elsewhere, too")
        if value is not None:
            state.fix_value(value, f"the weight of {layer!r}, which reads them, is used elsewhere, too")
    known = state.producers.setdefault(source, [])
    known.extend(name for name in layers if name not in known)
    if value is not None:
        state.consumers.update(dict.fromkeys(layers, value.segments))
    if node.args[0] in state.from_input:
        state.first.add(source)
    reads = None if value is None else value.segments
    state.calls.append(Call(layer, coefficient, output.segments, reads, outputs, inputs))
    return output.at(axis % dim_of(node))


def linear(state: State, node: Any) -> Value | None:
    """Reads and makes features."""
    shape = shape_of(node)
    return _connect(state, node, (nn.Linear,), -1, shape[-1], _PAIR * math.prod(shape[:-1]))


def convolution(count: int, transposed: bool) -> Callable[[State, Any], Value | None]:
    """Reads and makes channels; a depthwise one follows them."""

    def behaviour(state: State, node: Any) -> Value | None:
        weight, groups = shape_of(node.args[1]), argument(node, 6, "groups", 1)
        axis = dim_of(node) - 1 - count
        inputs, outputs = shape_of(node.args[0])[axis], shape_of(node)[axis]
        swept = shape_of(node.args[0] if transposed else node)
        positions = math.prod(swept) // swept[axis]
        coefficient = _PAIR * positions * math.prod(weight[2:])
        if groups == 1:
            value = _connect(state, node, CONVOLUTIONS, axis, outputs, coefficient)
            stride = argument(node, 3, "stride", [1])
            if value is not None and any(step > 1 for step in stride):
                state.strided.add(value.segments[0].source)
            return value
        if groups == inputs and outputs % groups == 0:
            return _depthwise(state, node, axis, outputs // groups, coefficient)
        state.fix([node.args[0]], "a convolution in groups reads them")
        state.calls.append(Call("", coefficient, None, None, outputs, inputs // groups))
        return None

    return behaviour


def _depthwise(state: State, node: Any, axis: int, times: int, coefficient: int) -> Value | None:
    value = state.values.get(node.args[0])
    layers = _layers(state, node, CONVOLUTIONS)
    entries = shape_of(node)[axis]
    if value is None or not layers or value.axis != axis:
        state.fix([node.args[0]], "a function reads them with a weight that is no layer's")
        state.calls.append(Call("", coefficient, None, None, entries, 1))
        return None
    segments = tuple(Segment(each.source, each.entries * times) for each in value.segments)
    state.calls.append(Call(layers[0], coefficient, segments, None, entries, 1))
    for layer in layers:
        _follow(state, node, layer, node.args[1:3], value, times)
    return Value(axis, segments, zero=True)


def _follow(state: State, node: Any, layer: str, tensors: Any, value: Value, times: int = 1) -> None:
    """Let a layer have parameters for each entry."""
    name = node.target._schema.name.removeprefix("aten::")
    nodes = [each for each in tensors if hasattr(each, "users")]
    key = id(_parameter(state, nodes[0]))
    _again(state, key, value)
    state.by_tensor.setdefault(key, (value, None))
    if not all(_serves_layers_alone(each, (name,)) for each in nodes):
        state.fix_value(value, f"the parameters of {layer!r}, which follow them, are used elsewhere, too")
    state.followers[layer] = (value.segments, times)


def _normalization(first: int, group: bool = False) -> Callable[[State, Any], Value | None]:
    """Statistics and parameters for each channel. ``first``: index of the weight among the arguments."""

    def behaviour(state: State, node: Any) -> Value | None:
        value = state.values.get(node.args[0])
        if value is None or value.axis != 1 or (group and node.args[1] != value.entries):
            return None
        tensors = list(node.args[first : first + (2 if group else 4)])
        given = [each for each in tensors if hasattr(each, "users")]
        # Without parameters a channel of zeros stays one only if its own statistics are used.
        own = group or (len(tensors) > 2 and tensors[2] is None) or _uses_own_statistics(node)
        if not given:
            if group:
                state.write(value)
            return value.at(value.axis, zero=value.zero and own)
        types: tuple[type[nn.Module], ...] = (nn.GroupNorm,) if group else (_NormBase,)
        found = _owner(state, given[0], types)
        if found is None or any(_owner(state, each, types) != found for each in given):
            return None
        _follow(state, node, found[0], given, value)
        masked = tensors[0] is not None and tensors[1] is not None
        return value.at(value.axis, zero=masked or (value.zero and own and tensors[1] is None))

    return behaviour


def _uses_own_statistics(node: Any) -> bool:
    return node.target._schema.name == "aten::instance_norm" and bool(argument(node, 5, "use_input_stats"))


def prelu(state: State, node: Any) -> Value | None:
    """A slope for all channels, or for each."""
    value, found = state.values.get(node.args[0]), _owner(state, node.args[1], (nn.PReLU,))
    if value is None or math.prod(shape_of(node.args[1])) == 1:
        return value
    if found is None or value.axis != 1:
        return None
    _follow(state, node, found[0], node.args[1:2], value)
    return value


LAYER_OPERATIONS: dict[str, Callable[[State, Any], Value | None]] = {
    "linear": linear,
    **{f"conv{count}d": convolution(count, False) for count in (1, 2, 3)},
    **{f"conv_transpose{count}d": convolution(count, True) for count in (1, 2, 3)},
    "batch_norm": _normalization(1),
    "instance_norm": _normalization(1),
    "group_norm": _normalization(2, group=True),
    "prelu": prelu,
}
"""Behaviour by the operation's name, as in :data:`.operations.OPERATIONS`."""
