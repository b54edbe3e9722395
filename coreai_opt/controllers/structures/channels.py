"""Which channels of a model belong together: found by following them through the exported program.

Pruning a filter removes an output channel, and with it what only that channel feeds: its batch-norm
parameters and the input channels of the layers that read it. Layers whose outputs are added, or whose
channels pass through a depthwise convolution, lose the same channels: they form a cluster.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.hooks import remove_hooks

__all__ = ["Cluster", "Consumer", "find_clusters"]


@dataclass(frozen=True)
class Segment:
    """``size`` neighbouring entries of an axis: the channels of ``source``, ``repeat`` entries each."""

    source: int
    size: int
    repeat: int = 1


@dataclass(frozen=True)
class Consumer:
    """A layer whose input axis is made of the segments, ``(cluster or None, size, repeat)`` each."""

    name: str
    segments: tuple[tuple[int | None, int, int], ...]


@dataclass
class Cluster:
    """Layers that lose the same output channels.

    Fields:
        size: channels.
        producers: convolutions whose filters they are.
        followers: depthwise convolutions and batch norms, with parameters for each channel.
        reads_input: whether a producer reads the model's input.
        strided: whether a producer reduces the resolution.
    """

    size: int
    producers: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    reads_input: bool = False
    strided: bool = False


@dataclass(frozen=True)
class _Value:
    """What is known of a tensor: its channel axis and what lies there; whether a masked channel is zero."""

    axis: int
    segments: tuple[Segment, ...]
    zero: bool = True


_SAME = {
    "relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "elu", "elu_", "gelu", "silu",
    "silu_", "tanh", "hardswish", "hardswish_", "mish", "dropout", "feature_dropout", "clone",
    "contiguous", "detach", "neg", "abs", "alias", "to", "_to_copy", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
    "interpolate",
}  # fmt: skip
_NOT_ZERO = {"sigmoid", "hardsigmoid", "hardsigmoid_"}
_SUMS = {"add", "add_", "sub", "sub_"}
_PRODUCTS = {"mul", "mul_"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


class _Tracer:
    def __init__(self, model: nn.Module, program: Any) -> None:
        self.model = model
        signature = program.graph_signature
        self.tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.values: dict[Any, _Value] = {}
        self.parent: list[int] = []
        self.sizes: list[int] = []
        self.fixed: set[int] = set()
        self.producers: dict[int, list[str]] = {}
        self.followers: dict[int, list[str]] = {}
        self.first: set[int] = set()
        self.strided: set[int] = set()
        self.consumers: list[tuple[str, tuple[Segment, ...]]] = []
        self.seen: set[str] = set()
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                for value in node.all_input_nodes:
                    self._fix(value)

    def source(self, size: int) -> int:
        self.parent.append(len(self.parent))
        self.sizes.append(size)
        return len(self.parent) - 1

    def root(self, source: int) -> int:
        while self.parent[source] != source:
            source = self.parent[source]
        return source

    def _unite(self, a: _Value, b: _Value) -> bool:
        mine, its = [(s.size, s.repeat) for s in a.segments], [(s.size, s.repeat) for s in b.segments]
        if mine != its:
            return False
        for x, y in zip(a.segments, b.segments, strict=True):
            self.parent[self.root(y.source)] = self.root(x.source)
        return True

    def _fix(self, node: Any) -> None:
        value = self.values.get(node)
        if value is not None:
            self.fixed.update(segment.source for segment in value.segments)

    def _layer(self, node: Any) -> str:
        """Name of the module whose parameter a node is."""
        return str(self.tensors.get(getattr(node, "name", ""), "")).rpartition(".")[0]

    def _visit(self, node: Any) -> None:
        name = getattr(node.target, "_schema", None)
        operation = name.name.removeprefix("aten::") if name is not None else ""
        handler: Callable[[Any], _Value | None] | None = None
        if operation in _CONVOLUTIONS:
            handler = self._convolution
        elif operation == "linear":
            handler = self._linear
        elif operation == "batch_norm":
            handler = self._batch_norm
        elif operation in _SAME or operation in _NOT_ZERO:
            handler = self._same
        elif operation in _SUMS | _PRODUCTS:
            handler = self._binary
        elif operation == "cat":
            handler = self._cat
        elif operation in ("flatten", "view", "reshape", "mean"):
            handler = self._reshape
        result = handler(node) if handler else None
        if result is not None:
            self.values[node] = result
        elif handler not in (self._convolution, self._linear):
            for each in node.all_input_nodes:
                self._fix(each)

    def _same(self, node: Any) -> _Value | None:
        value = self.values.get(node.args[0])
        if value is None:
            return None
        zero = value.zero and node.target._schema.name.removeprefix("aten::") not in _NOT_ZERO
        return _Value(value.axis, value.segments, zero)

    def _binary(self, node: Any) -> _Value | None:
        operation = node.target._schema.name.removeprefix("aten::")
        a, b = (self.values.get(each) if hasattr(each, "op") else each for each in node.args[:2])
        if isinstance(a, _Value) and isinstance(b, int | float):
            return _Value(a.axis, a.segments, a.zero and operation in _PRODUCTS)
        if not (isinstance(a, _Value) and isinstance(b, _Value)) or a.axis != b.axis:
            return None
        shapes = [each.meta["val"].shape for each in node.args[:2]]
        if len(shapes[0]) != len(shapes[1]) or not self._unite(a, b):
            return None
        zero = a.zero or b.zero if operation in _PRODUCTS else a.zero and b.zero
        return _Value(a.axis, a.segments, zero)

    def _cat(self, node: Any) -> _Value | None:
        values = [self.values.get(each) for each in node.args[0]]
        axis = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()
        if any(value is None or value.axis != axis for value in values):
            return None
        known = [value for value in values if value is not None]
        segments = tuple(segment for value in known for segment in value.segments)
        return _Value(axis, segments, all(value.zero for value in known))

    def _reshape(self, node: Any) -> _Value | None:
        """Axes behind the channels may go, or merge into them; those before stay."""
        value = self.values.get(node.args[0])
        if value is None:
            return None
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        axis = value.axis
        if tuple(before[: axis + 1]) == tuple(after[: axis + 1]):
            return value
        is_mean = node.target._schema.name == "aten::mean"
        merged = math.prod(int(size) for size in before[axis:])
        if (
            is_mean
            or tuple(before[:axis]) != tuple(after[:axis])
            or len(after) != axis + 1
            or after[axis] != merged
        ):
            return None
        times = math.prod(int(size) for size in before[axis + 1 :])
        segments = tuple(Segment(s.source, s.size, s.repeat * times) for s in value.segments)
        return _Value(axis, segments, value.zero)

    def _consume(self, node: Any, layer: str) -> _Value | None:
        value = self.values.get(node.args[0])
        if value is not None and (not value.zero or layer in self.seen):
            self._fix(node.args[0])
        if value is not None:
            self.consumers.append((layer, value.segments))
        return value

    def _convolution(self, node: Any) -> _Value | None:
        layer = self._layer(node.args[1])
        module: Any = dict(self.model.named_modules()).get(layer)
        if not layer or module is None:
            for each in node.all_input_nodes:
                self._fix(each)
            return None
        axis = node.meta["val"].dim() - 1 - len(module.kernel_size)
        value = self.values.get(node.args[0])
        if module.groups > 1:
            if (
                module.groups == module.in_channels == module.out_channels
                and value is not None
                and value.zero
            ):
                for segment in value.segments:
                    if len(value.segments) > 1 or layer in self.seen:
                        self.fixed.add(segment.source)
                self.followers.setdefault(value.segments[0].source, []).append(layer)
                self.seen.add(layer)
                return value
            self._fix(node.args[0])
            source = self.source(module.out_channels)
            self.fixed.add(source)
            return _Value(axis, (Segment(source, module.out_channels),))
        self._consume(node, layer)
        source = self.source(module.out_channels)
        if layer in self.seen:  # a layer that runs twice
            self.fixed.add(source)
        self.seen.add(layer)
        self.producers.setdefault(source, []).append(layer)
        if value is None:
            self.first.add(source)
        if any(step > 1 for step in module.stride):
            self.strided.add(source)
        return _Value(axis, (Segment(source, module.out_channels),))

    def _linear(self, node: Any) -> _Value | None:
        layer = self._layer(node.args[1])
        value = self.values.get(node.args[0])
        if value is not None and (not layer or value.axis != node.args[0].meta["val"].dim() - 1):
            self._fix(node.args[0])
        elif value is not None:
            self._consume(node, layer)
        self.seen.add(layer)
        return None

    def _batch_norm(self, node: Any) -> _Value | None:
        value = self.values.get(node.args[0])
        layer = self._layer(node.args[1]) if node.args[1] is not None else ""
        if (
            value is None
            or not layer
            or len(value.segments) != 1
            or layer in self.seen
            or node.args[2] is None
        ):
            return None
        self.seen.add(layer)
        self.followers.setdefault(value.segments[0].source, []).append(layer)
        return _Value(value.axis, value.segments)


def find_clusters(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Cluster], list[Consumer]]:
    """The clusters whose channels can be removed, and the layers that read them.

    Channels that reach the model's output, or an operation that is not known to treat each of them alone, are
    left out.

    Args:
        model: the uncompressed model; it stays as it is.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.
    """
    plain = copy_model(model).eval()
    remove_hooks(plain, lambda hook: True)
    with torch.no_grad():
        program = torch.export.export(plain, args, kwargs, strict=False)
    tracer = _Tracer(plain, program)
    fixed = {tracer.root(source) for source in tracer.fixed}
    roots = sorted({tracer.root(source) for source in tracer.producers} - fixed)
    numbers = {root: number for number, root in enumerate(roots)}
    clusters = [Cluster(tracer.sizes[root]) for root in roots]
    for table, name in ((tracer.producers, "producers"), (tracer.followers, "followers")):
        for source, layers in table.items():
            number = numbers.get(tracer.root(source))
            if number is not None:
                getattr(clusters[number], name).extend(layers)
    for sources, name in ((tracer.first, "reads_input"), (tracer.strided, "strided")):
        for source in sources:
            number = numbers.get(tracer.root(source))
            if number is not None:
                setattr(clusters[number], name, True)
    consumers = [
        Consumer(
            layer,
            tuple((numbers.get(tracer.root(s.source)), s.size, s.repeat) for s in segments),
        )
        for layer, segments in tracer.consumers
    ]
    return clusters, consumers
