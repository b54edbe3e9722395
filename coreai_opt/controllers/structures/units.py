"""Units that linear layers share: attention heads and feed-forward dimensions, found in the exported program.

The output features of a linear layer are followed through operations that treat them alike until other linear
layers read them as input features. A feed-forward dimension is a row of the first layer and a column of the
second. Where the features are split into heads that attention treats one by one, a head is a block of rows of
query, key and value, and of columns of the output projection.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.hooks import remove_hooks

__all__ = ["Structure", "find_structures"]


@dataclass(frozen=True)
class Structure:
    """Linear layers that share units.

    Fields:
        units: how many; each is a block of neighbouring rows, or columns, of every layer.
        rows: layers that make them.
        columns: layers that read them.
        removable: whether the model runs with fewer; no if somewhere their number is written down.
    """

    units: int
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    removable: bool

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Structure":
        """From its fields, with lists for tuples."""
        return cls(state["units"], tuple(state["rows"]), tuple(state["columns"]), state["removable"])


@dataclass(frozen=True)
class _Value:
    """The axis of a tensor along which the units of a source lie."""

    axis: int
    source: int


_POINTWISE = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "silu_", "mish", "tanh", "sigmoid",
    "hardsigmoid", "hardswish", "softplus", "erf", "exp", "neg", "abs", "pow", "sqrt", "rsqrt", "square",
    "cos", "sin", "dropout", "dropout_", "clone", "contiguous", "detach", "alias", "to", "_to_copy",
    "type_as", "clamp", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "where", "maximum",
    "minimum", "masked_fill",
}  # fmt: skip
_ONE_AXIS = {"softmax", "log_softmax", "_softmax", "cumsum", "slice", "narrow"}
_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}


class _Tracer:
    def __init__(self, model: nn.Module, program: Any) -> None:
        signature = program.graph_signature
        self.tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.modules = dict(model.named_modules())
        self.values: dict[Any, _Value] = {}
        self.parent: list[int] = []
        self.units: list[int] = []
        self.fixed: set[int] = set()
        self.written: set[int] = set()
        self.rows: list[str] = []
        self.columns: list[tuple[int, str]] = []
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                self._fix(node)

    def root(self, source: int) -> int:
        while self.parent[source] != source:
            source = self.parent[source]
        return source

    def _fix(self, node: Any) -> None:
        """What enters a node has to stay whole."""
        self.fixed.update(self.values[each].source for each in node.all_input_nodes if each in self.values)

    def _coarsen(self, source: int, entries: int) -> bool:
        """Let the units of a source be ones of which an axis of ``entries`` has whole ones."""
        root = self.root(source)
        if entries % self.units[root] == 0:
            return True
        if self.units[root] % entries:
            return False
        self.units[root] = entries
        return True

    def _unite(self, a: int, b: int) -> bool:
        first, second = self.root(a), self.root(b)
        if not self._coarsen(first, self.units[second]) or not self._coarsen(second, self.units[first]):
            return False
        self.parent[second] = first
        return True

    def _visit(self, node: Any) -> None:
        if node.target is torch.ops.aten.linear.default:
            self._linear(node)
            return
        if not any(each in self.values for each in node.all_input_nodes):
            return
        schema = getattr(node.target, "_schema", None)
        if schema is not None and not schema.returns:  # an assertion
            return
        operation = schema.name.removeprefix("aten::") if schema is not None else ""
        handlers: dict[str, Callable[[Any], _Value | None]] = {
            **dict.fromkeys(_POINTWISE, self._together),
            **dict.fromkeys(_ONE_AXIS, self._one_axis),
            **dict.fromkeys(_VIEWS, self._view),
            **dict.fromkeys(("mean", "sum", "amax"), self._reduce),
            **dict.fromkeys(("layer_norm", "rms_norm"), self._norm),
            **dict.fromkeys(("matmul", "bmm"), self._matmul),
            "cat": self._cat,
            "expand": self._expand,
            "permute": self._permute,
            "scaled_dot_product_attention": self._attention,
            "transpose": self._transpose,
            "unsqueeze": self._unsqueeze,
        }
        handler = handlers.get(operation)
        value = handler(node) if handler else None
        if value is None:
            self._fix(node)
        else:
            self.values[node] = value

    def _linear(self, node: Any) -> None:
        layer = str(self.tensors.get(node.args[1].name, "")).rpartition(".")[0]
        value = self.values.get(node.args[0])
        # A weight that is used twice serves units of two places.
        known = isinstance(self.modules.get(layer), nn.Linear) and len(node.args[1].users) == 1
        if value is not None and known and value.axis == _dim(node.args[0]) - 1:
            self.columns.append((value.source, layer))
        else:
            self._fix(node)
        if known:
            source = len(self.rows)
            self.rows.append(layer)
            self.parent.append(source)
            self.units.append(int(node.meta["val"].shape[-1]))
            self.values[node] = _Value(_dim(node) - 1, source)

    def _aligned(self, node: Any, inputs: list[Any]) -> _Value | None:
        """The value of a result whose axes line up with those of its inputs, counted from the last."""
        dim = _dim(node)
        tracked = [each for each in inputs if each in self.values]
        axes = {self.values[each].axis - _dim(each) for each in tracked}
        if len(axes) != 1:
            return None
        (axis,) = axes
        first = self.values[tracked[0]]
        for each in inputs:
            if _dim(each) < -axis or _shape(each)[axis] == 1:
                continue
            if each not in self.values:
                self.written.add(first.source)
            elif _shape(each)[axis] != _shape(tracked[0])[axis] or not self._unite(
                first.source, self.values[each].source
            ):
                return None
        return _Value(dim + axis, first.source)

    def _together(self, node: Any) -> _Value | None:
        return self._aligned(node, [each for each in node.all_input_nodes if "val" in each.meta])

    def _cat(self, node: Any) -> _Value | None:
        axis = _argument(node, 1, "dim", 0) % _dim(node)
        value = self._together(node)
        return value if value is not None and value.axis != axis else None

    def _matmul(self, node: Any) -> _Value | None:
        """Products of matrices, one for each head."""
        value = self._aligned(node, list(node.args[:2]))
        return value if value is not None and value.axis < _dim(node) - 2 else None

    def _attention(self, node: Any) -> _Value | None:
        inputs = [each for each in node.all_input_nodes if "val" in each.meta]
        if node.kwargs.get("enable_gqa") or any(each not in self.values for each in node.args[:3]):
            return None
        value = self._aligned(node, inputs)
        return value if value is not None and value.axis < _dim(node) - 2 else None

    def _one_axis(self, node: Any) -> _Value | None:
        value = self.values[node.args[0]]
        return value if _argument(node, 1, "dim", 0) % _dim(node) != value.axis else None

    def _norm(self, node: Any) -> _Value | None:
        value = self.values.get(node.args[0])
        return value if value is not None and value.axis < _dim(node) - len(node.args[1]) else None

    def _reduce(self, node: Any) -> _Value | None:
        value, dim = self.values[node.args[0]], _dim(node.args[0])
        over = _argument(node, 1, "dim", None)
        if (not over and over != 0) or dim != _dim(node):
            return None
        axes = {each % dim for each in ([over] if isinstance(over, int) else over)}
        return value if value.axis not in axes else None

    def _expand(self, node: Any) -> _Value | None:
        value, added = self.values[node.args[0]], _dim(node) - _dim(node.args[0])
        axis = value.axis + added
        if _shape(node)[axis] != _shape(node.args[0])[value.axis]:
            return None
        if node.args[1][axis] != -1:
            self.written.add(value.source)
        return _Value(axis, value.source)

    def _transpose(self, node: Any) -> _Value:
        value = self.values[node.args[0]]
        a, b = (each % _dim(node) for each in node.args[1:3])
        return _Value({a: b, b: a}.get(value.axis, value.axis), value.source)

    def _permute(self, node: Any) -> _Value:
        value = self.values[node.args[0]]
        order = [each % _dim(node) for each in node.args[1]]
        return _Value(order.index(value.axis), value.source)

    def _unsqueeze(self, node: Any) -> _Value:
        value = self.values[node.args[0]]
        return _Value(value.axis + (node.args[1] % _dim(node) <= value.axis), value.source)

    def _view(self, node: Any) -> _Value | None:
        """The axis that begins where the units' axis began, if it holds whole units."""
        value = self.values[node.args[0]]
        before, after = _shape(node.args[0]), _shape(node)
        ahead = math.prod(before[: value.axis])
        starts = itertools.accumulate(after, lambda product, size: product * size, initial=1)
        axes = [axis for axis, (start, size) in enumerate(zip(starts, after, strict=False)) if start == ahead]
        axes = [axis for axis in axes if after[axis] != 1]
        if not axes or not self._coarsen(value.source, after[axes[0]]):
            return None
        sizes = node.args[1] if isinstance(node.args[1], list | tuple) else None
        operation = node.target._schema.name
        if operation == "aten::unflatten":
            sizes = [*before[: node.args[1] % len(before)], *node.args[2]]
        if sizes is not None and axes[0] < len(sizes) and sizes[axes[0]] != -1:
            self.written.add(value.source)
        return _Value(axes[0], value.source)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _dim(node: Any) -> int:
    return int(node.meta["val"].dim())


def _argument(node: Any, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def find_structures(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: set[str]
) -> list[Structure]:
    """The units that linear layers share.

    Features that reach the model's output, or an operation that is not known to treat them alike, are no
    units; nor are those that a layer outside of ``layers`` makes or reads.

    Args:
        model: the uncompressed model; it stays as it is.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.
        layers: names of the layers to look at.

    Raises:
        ValueError: the model cannot be exported.
    """
    plain = copy_model(model).eval()
    remove_hooks(plain, lambda hook: True)
    try:
        with torch.no_grad():
            program = torch.export.export(plain, args, kwargs, strict=False)
    except Exception as error:
        raise ValueError(
            "the structures of the model are found in its exported program, and torch.export fails for it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    tracer = _Tracer(plain, program)
    structures = []
    roots = [tracer.root(source) for source in range(len(tracer.rows))]
    fixed = {tracer.root(source) for source in tracer.fixed}
    written = {tracer.root(source) for source in tracer.written}
    for root in sorted(set(roots) - fixed):
        rows = tuple(name for name, its in zip(tracer.rows, roots, strict=True) if its == root)
        columns = tuple(name for source, name in tracer.columns if tracer.root(source) == root)
        if columns and tracer.units[root] > 1 and layers.issuperset(rows + columns):
            structures.append(Structure(tracer.units[root], rows, columns, root not in written))
    return structures
