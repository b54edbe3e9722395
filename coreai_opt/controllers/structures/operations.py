"""THE table of operations and of what they do to channels: :data:`OPERATIONS`.

A behaviour takes the state and the node, and returns the value of the result, or None where the operation
mixes entries; whatever flows into it has to stay then. An operation that is not in the table mixes.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

from coreai_opt.controllers.structures.trace import Segment, State, Value, argument, dim_of, shape_of

__all__ = ["OPERATIONS", "Behaviour"]

Behaviour = Callable[[State, Any], Value | None]


def _tensors(node: Any) -> list[Any]:
    return [each for each in node.all_input_nodes if hasattr(each.meta.get("val"), "dim")]


def keeps_zero(state: State, node: Any) -> Value | None:
    """One tensor, entry by entry; zero becomes zero."""
    return state.values.get(node.args[0])


def loses_zero(state: State, node: Any) -> Value | None:
    """One tensor, entry by entry; zero becomes something else."""
    value = state.values.get(node.args[0])
    return None if value is None else value.at(value.axis, zero=False)


def clamps(state: State, node: Any) -> Value | None:
    """One tensor, entry by entry, between two bounds; zero stays if it lies between them."""
    value = state.values.get(node.args[0])
    bounds = list(node.args[1:3])
    bounds += [node.kwargs[name] for name in ("min", "max", "min_val", "max_val") if name in node.kwargs]
    if value is None or any(hasattr(each, "op") for each in bounds):
        return together(state, node)
    low = bounds[0] if bounds and bounds[0] is not None else 0
    high = bounds[1] if len(bounds) > 1 and bounds[1] is not None else 0
    return value.at(value.axis, zero=value.zero and low <= 0 <= high)


def adds(state: State, node: Any) -> Value | None:
    """A sum: of tensors, which lose the same entries, or with a number or parameters.

    An activation that is no layer's output has entries that stay, and are not zero.
    """
    inputs = _tensors(node)
    value = state.aligned(node, inputs)
    if value is None:
        return None
    axis = value.axis - dim_of(node)
    for each in state.activations.intersection(inputs) - state.values.keys():
        if state.only_zero and dim_of(each) >= -axis and shape_of(each)[axis] != 1:
            return None
    both = len([each for each in node.args[:2] if hasattr(each, "op")]) == 2
    return value if both else value.at(value.axis, zero=False)


def multiplies(state: State, node: Any) -> Value | None:
    """A product: zero where a factor is."""
    inputs = _tensors(node)
    value = state.aligned(node, inputs)
    zero = any(state.values[each].zero for each in inputs if each in state.values)
    return None if value is None else value.at(value.axis, zero=zero)


def divides(state: State, node: Any) -> Value | None:
    """A quotient: zero where the dividend is, unless the divisor has the same entries."""
    value = state.aligned(node, _tensors(node))
    dividend, divisor = node.args[0], node.args[1]
    zero = dividend in state.values and state.values[dividend].zero and divisor not in state.values
    return None if value is None else value.at(value.axis, zero=zero)


def together(state: State, node: Any) -> Value | None:
    """Several tensors, entry by entry; nothing is known of zeros."""
    value = state.aligned(node, _tensors(node))
    return None if value is None else value.at(value.axis, zero=False)


def spatial(count: int) -> Behaviour:
    """Only the last ``count`` axes are touched: pools and resizing. Zeros stay."""

    def behaviour(state: State, node: Any) -> Value | None:
        value = state.values.get(node.args[0])
        return value if value is not None and value.axis < dim_of(node.args[0]) - count else None

    return behaviour


def pads(state: State, node: Any) -> Value | None:
    """Padding of the last axes; another value than zero is not zero."""
    value = state.values.get(node.args[0])
    if value is None or value.axis >= dim_of(node) - len(node.args[1]) // 2:
        return None
    name = node.target._schema.name
    constant = argument(node, 2, "value", 0) if name.endswith("constant_pad_nd") else 0
    if name == "aten::pad" and argument(node, 2, "mode", "constant") == "constant":
        constant = argument(node, 3, "value", None) or 0
    return value.at(value.axis, zero=value.zero and constant == 0)


def one_axis(zero: bool) -> Behaviour:
    """One other axis is mixed."""

    def behaviour(state: State, node: Any) -> Value | None:
        value = state.values.get(node.args[0])
        axis = argument(node, 1, "dim", 0)
        if value is None or axis is None or axis % dim_of(node) == value.axis:
            return None
        return value.at(value.axis, zero=value.zero and zero)

    return behaviour


def several_axes(state: State, node: Any) -> Value | None:
    """Some other axes are rolled or flipped."""
    value = state.values.get(node.args[0])
    axes = node.args[-1]
    if value is None or not isinstance(axes, list | tuple) or not axes:
        return None
    return value if value.axis not in {each % dim_of(node) for each in axes} else None


def reduces(state: State, node: Any) -> Value | None:
    """A sum, mean or extreme over other axes."""
    value, before = state.values.get(node.args[0]), node.args[0]
    over = argument(node, 1, "dim")
    if value is None or not hasattr(node.meta["val"], "dim") or over is None or over == []:
        return None
    axes = {each % dim_of(before) for each in ([over] if isinstance(over, int) else over)}
    if value.axis in axes or (not state.only_zero and dim_of(node) != dim_of(before)):
        return None  # the features of a whole sequence are not those of its tokens
    gone = 0 if dim_of(node) == dim_of(before) else sum(axis < value.axis for axis in axes)
    return value.at(value.axis - gone)


def norms(state: State, node: Any) -> Value | None:
    """Normalization over the last axes, with the same parameters for all entries."""
    value = state.values.get(node.args[0])
    if value is None or value.axis >= dim_of(node) - len(node.args[1]):
        return None
    has_bias = node.target._schema.name == "aten::layer_norm" and argument(node, 3, "bias") is not None
    return value.at(value.axis, zero=value.zero and not has_bias)


def multiplies_matrices(state: State, node: Any) -> Value | None:
    """Products of matrices, one for each entry."""
    inputs = list(node.args[:2])
    value = state.aligned(node, inputs)
    if value is None or value.axis >= dim_of(node) - 2:
        return None
    return value.at(value.axis, zero=any(state.values[e].zero for e in inputs if e in state.values))


def attends(state: State, node: Any) -> Value | None:
    """Attention, of each entry (head) by itself."""
    if argument(node, 7, "enable_gqa", False) or any(each not in state.values for each in node.args[:3]):
        return None
    value = state.aligned(node, _tensors(node))
    if value is None or value.axis >= dim_of(node) - 2:
        return None
    return value.at(value.axis, zero=state.values[node.args[2]].zero)


def concatenates(state: State, node: Any) -> Value | None:
    """Along the entries' axis, segments one after the other; along another, the same entries."""
    inputs = list(node.args[0])
    axis = argument(node, 1, "dim", 0) % dim_of(node)
    values = [state.values.get(each) for each in inputs]
    tracked = [value for value in values if value is not None]
    if all(value.axis == axis for value in tracked):
        segments: list[Segment] = []
        for each, value in zip(inputs, values, strict=True):
            if value is None:
                source = state.source(shape_of(each)[axis])
                state.fixed[source] = "they are no layer's output"
                segments.append(Segment(source, shape_of(each)[axis]))
            else:
                segments.extend(value.segments)
        return Value(axis, tuple(segments), all(value is None or value.zero for value in values))
    if any(value.axis == axis for value in tracked):
        return None
    value = state.aligned(node, inputs)
    return None if value is None else value.at(value.axis, zero=all(each.zero for each in tracked))


def stacks(state: State, node: Any) -> Value | None:
    """Along a new axis: the same entries."""
    inputs = list(node.args[0])
    values = [state.values.get(each) for each in inputs]
    first = values[0]
    if first is None or any(value is None or value.axis != first.axis for value in values):
        return None
    known = [value for value in values if value is not None]
    if not all(value is first or state.unite(first, value) for value in known):
        return None
    axis = argument(node, 1, "dim", 0) % dim_of(node)
    return first.at(first.axis + (axis <= first.axis), zero=all(value.zero for value in known))


def divides_axis(state: State, node: Any) -> Value | None:
    """Another axis is split into a list of tensors, which :func:`takes_item` looks into."""
    value = state.values.get(node.args[0])
    index, default = (1, 0) if node.target._schema.name == "aten::unbind" else (2, 0)
    axis = argument(node, index, "dim", default) % dim_of(node.args[0])
    if value is None or axis == value.axis:
        return None
    gone = node.target._schema.name == "aten::unbind" and axis < value.axis
    return value.at(value.axis - gone)


def takes_item(state: State, node: Any) -> Value | None:
    """One tensor of a list; of a pool that also returns indices, not these."""
    name = getattr(getattr(node.args[0].target, "_schema", None), "name", "")
    return None if "pool" in name and node.args[1] != 0 else state.values.get(node.args[0])


def selects(state: State, node: Any) -> Value | None:
    """One index of another axis."""
    value = state.values.get(node.args[0])
    axis = node.args[1] % dim_of(node.args[0])
    return None if value is None or axis == value.axis else value.at(value.axis - (axis < value.axis))


def expands(state: State, node: Any) -> Value | None:
    """Other axes are repeated."""
    value = state.values.get(node.args[0])
    if value is None:
        return None
    axis = value.axis + dim_of(node) - dim_of(node.args[0])
    if shape_of(node)[axis] != value.entries:
        return None
    sizes = node.args[1] if isinstance(node.args[1], list | tuple) else None
    if sizes is not None and sizes[axis] != -1:
        state.write(value)
    return value.at(axis)


def transposes(state: State, node: Any) -> Value | None:
    """Two axes change places."""
    value = state.values.get(node.args[0])
    if value is None:
        return None
    a, b = (each % dim_of(node) for each in (node.args[1:3] if len(node.args) > 2 else (0, 1)))
    return value.at({a: b, b: a}.get(value.axis, value.axis))


def permutes(state: State, node: Any) -> Value | None:
    """Axes in another order."""
    value = state.values.get(node.args[0])
    return None if value is None else value.at([e % dim_of(node) for e in node.args[1]].index(value.axis))


def moves_axes(state: State, node: Any) -> Value | None:
    """Some axes get other places."""
    value = state.values.get(node.args[0])
    if value is None:
        return None
    pairs = [[each] if isinstance(each, int) else list(each) for each in node.args[1:3]]
    sources, places = ([each % dim_of(node) for each in axes] for axes in pairs)
    order = [axis for axis in range(dim_of(node)) if axis not in sources]
    for place, source in sorted(zip(places, sources, strict=True)):
        order.insert(place, source)
    return value.at(order.index(value.axis))


def unsqueezes(state: State, node: Any) -> Value | None:
    """A new axis of one index."""
    value = state.values.get(node.args[0])
    return None if value is None else value.at(value.axis + (node.args[1] % dim_of(node) <= value.axis))


def squeezes(state: State, node: Any) -> Value | None:
    """Axes of one index go."""
    value = state.values.get(node.args[0])
    before = node.args[0]
    over = argument(node, 1, "dim")
    axes = range(dim_of(before)) if over is None else [over] if isinstance(over, int) else over
    gone = {each % dim_of(before) for each in axes if shape_of(before)[each] == 1}
    if value is None or value.axis in gone:
        return None
    if over is None and value.entries > 1:
        state.write(value)  # with a single entry, its axis would go, too
    return value.at(value.axis - sum(axis < value.axis for axis in gone))


def views(state: State, node: Any) -> Value | None:
    """Another shape: the axis that begins where the entries' axis began, if it holds whole units."""
    value = state.values.get(node.args[0])
    if value is None:
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    ahead = math.prod(before[: value.axis])
    starts = itertools.accumulate(after, lambda product, size: product * size, initial=1)
    axes = [axis for axis, (start, size) in enumerate(zip(starts, after, strict=False)) if start == ahead]
    axes = [axis for axis in axes if after[axis] != 1]
    if not axes:
        return None
    axis, entries = axes[0], after[axes[0]]
    segments = value.segments
    if len(segments) > 1 and entries % value.entries:
        return None  # an axis that is split has units of one source
    if entries % value.entries == 0:
        times = entries // value.entries
        segments = tuple(Segment(s.source, s.entries * times) for s in segments)
    else:
        segments = (Segment(segments[0].source, entries),)
    if not all(state.coarsen(segment.source, segment.entries) for segment in segments):
        return None
    sizes = node.args[1] if isinstance(node.args[1], list | tuple) else None
    if node.target._schema.name == "aten::unflatten":
        sizes = [*before[: node.args[1] % len(before)], *node.args[2]]
    elif node.target._schema.name == "aten::flatten":
        sizes = None
    if sizes is not None and axis < len(sizes) and sizes[axis] != -1:
        state.write(value)
    return Value(axis, segments, value.zero)


def shuffles_pixels(state: State, node: Any) -> Value | None:
    """``r * r`` neighbouring channels become one of ``r`` times the extent, or the other way round."""
    value = state.values.get(node.args[0])
    if value is None or value.axis != dim_of(node) - 3 or len(value.segments) != 1:
        return None
    entries = shape_of(node)[value.axis]
    (segment,) = value.segments
    if not state.coarsen(segment.source, entries):
        return None
    return Value(value.axis, (Segment(segment.source, entries),), value.zero)


_KEEPS_ZERO = [
    "abs", "alias",
    "alpha_dropout", "celu", "clone", "contiguous", "detach", "dropout", "elu", "erf", "expm1",
    "feature_alpha_dropout", "feature_dropout", "gelu", "hardshrink", "hardswish", "leaky_relu", "mish",
    "neg", "relu", "relu6", "rrelu", "selu", "sign", "silu", "sin", "softshrink", "softsign", "sqrt",
    "square", "tanh", "tanhshrink", "tan", "to", "_to_copy", "type_as", "float", "half", "bfloat16",
    "native_dropout", "lift_fresh_copy",
]  # fmt: skip
_LOSES_ZERO = [
    "acos", "cos", "exp", "hardsigmoid", "log", "log1p", "logit", "log_sigmoid", "reciprocal", "rsqrt",
    "sigmoid", "softplus", "threshold", "logical_not", "isnan", "eq", "ne", "lt", "le", "gt", "ge",
]  # fmt: skip
_TOGETHER = [
    "where", "maximum", "minimum", "masked_fill", "pow", "lerp", "addcmul", "addcdiv", "atan2", "fmod",
    "remainder",
]  # fmt: skip

OPERATIONS: dict[str, Behaviour] = {
    **dict.fromkeys(_KEEPS_ZERO, keeps_zero),
    **dict.fromkeys(_LOSES_ZERO, loses_zero),
    **dict.fromkeys(_TOGETHER, together),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), clamps),
    **dict.fromkeys(("add", "sub", "rsub"), adds),
    "mul": multiplies,
    "div": divides,
    **{
        f"{kind}{count}d": spatial(count)
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
        for count in (1, 2, 3)
    },
    "upsample_nearest1d": spatial(1),
    "upsample_linear1d": spatial(1),
    **dict.fromkeys(
        ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"),
        spatial(2),
    ),
    **dict.fromkeys(("upsample_nearest3d", "upsample_trilinear3d"), spatial(3)),
    **dict.fromkeys(("pad", "constant_pad_nd"), pads),
    **{f"{kind}_pad{count}d": pads for kind in ("reflection", "replication") for count in (1, 2, 3)},
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), one_axis(zero=False)),
    **dict.fromkeys(("cumsum", "slice", "narrow"), one_axis(zero=True)),
    "index_select": one_axis(zero=True),
    **dict.fromkeys(("flip", "roll"), several_axes),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduces),
    **dict.fromkeys(("layer_norm", "rms_norm"), norms),
    **dict.fromkeys(("matmul", "bmm"), multiplies_matrices),
    "scaled_dot_product_attention": attends,
    **dict.fromkeys(("cat", "concat"), concatenates),
    "stack": stacks,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), divides_axis),
    "getitem": takes_item,
    "select": selects,
    "expand": expands,
    **dict.fromkeys(("transpose", "t"), transposes),
    "permute": permutes,
    "movedim": moves_axes,
    "unsqueeze": unsqueezes,
    "squeeze": squeezes,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), views),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), shuffles_pixels),
}
"""Behaviour by the operation's name; an operation in place, ``relu_``, is that without the underscore."""
