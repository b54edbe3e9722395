"""Channels, features and heads of a model, followed through its exported program.

The outputs of a convolution are channels, those of a linear layer features: both are the entries of an axis
that come from one *source*. Operations keep the entries apart, or mix them; where two sources meet, as in an
addition, they lose the same entries. An axis that is split so that several entries stay together makes them
one *unit*: the features of an attention head.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Call", "Segment", "State", "Value", "argument", "dim_of", "shape_of"]


@dataclass(frozen=True)
class Segment:
    """Neighbouring entries of an axis: all of a source's, ``entries ÷ units`` for each of its units."""

    source: int
    entries: int


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Fields:
        axis: where the entries lie.
        segments: of the axis, in order.
        zero: whether an entry is zero where the weights that make it, and their biases, are masked.
    """

    axis: int
    segments: tuple[Segment, ...]
    zero: bool = True

    @property
    def entries(self) -> int:
        """Extent of the axis."""
        return sum(segment.entries for segment in self.segments)

    def at(self, axis: int, zero: bool | None = None) -> "Value":
        """The same entries in another axis."""
        return Value(axis, self.segments, self.zero if zero is None else zero)


@dataclass(frozen=True)
class Call:
    """One run of a convolution or linear layer.

    Fields:
        layer: its name.
        coefficient: FLOPs for each pair of an output and an input entry; of a depthwise one, for each output.
        outputs, inputs: the entries; None for all that there are, of which the number follows.
        output_entries, input_entries: how many there are; 1 input for depthwise ones.
    """

    layer: str
    coefficient: int
    outputs: tuple[Segment, ...] | None
    inputs: tuple[Segment, ...] | None
    output_entries: int
    input_entries: int


@dataclass
class State:
    """What has been found.

    Fields:
        model: the uncompressed model.
        tensors: qualified names of parameters and buffers, by the name of their node.
        only_zero: whether entries stay that are not zero, once masked, where a layer reads them.
        values: of the nodes that carry entries of sources.
        channels: of each source, its entries where it begins.
        units: of each source, how many units they make; valid at the root.
        fixed: sources whose units cannot be removed, and why; valid at any member.
        written: sources whose number of units the program spells out.
        producers: layers that make a source's entries.
        consumers, followers: layers that read entries, or have parameters for each; with a multiplier.
        by_tensor: of each weight that was seen, its first call's input and output.
        from_input: nodes that no layer has touched yet.
        activations: nodes that depend on the model's input.
        first, strided: sources whose layers read the model's input, or reduce resolution.
        calls: of convolutions and linear layers.
    """

    model: nn.Module
    tensors: dict[str, str]
    only_zero: bool = True
    values: dict[Any, Value] = field(default_factory=dict)
    parent: list[int] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    producers: dict[int, list[str]] = field(default_factory=dict)
    consumers: dict[str, tuple[Segment, ...]] = field(default_factory=dict)
    followers: dict[str, tuple[tuple[Segment, ...], int]] = field(default_factory=dict)
    by_tensor: dict[int, tuple[Value | None, Value | None]] = field(default_factory=dict)
    from_input: set[Any] = field(default_factory=set)
    activations: set[Any] = field(default_factory=set)
    first: set[int] = field(default_factory=set)
    strided: set[int] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)

    def source(self, entries: int) -> int:
        """A new source."""
        self.parent.append(len(self.parent))
        self.channels.append(entries)
        self.units.append(entries)
        return len(self.parent) - 1

    def root(self, source: int) -> int:
        """The source that stands for all that lose the same units."""
        while self.parent[source] != source:
            source = self.parent[source]
        return source

    def fix(self, nodes: Iterable[Any], reason: str) -> None:
        """The entries of the nodes have to stay."""
        for node in nodes:
            value = self.values.get(node)
            if value is not None:
                self.fix_value(value, reason)

    def fix_value(self, value: Value, reason: str) -> None:
        """The entries of a value have to stay."""
        for segment in value.segments:
            self.fixed.setdefault(segment.source, reason)

    def write(self, value: Value) -> None:
        """The program spells out how many entries there are."""
        self.written.update(segment.source for segment in value.segments)

    def coarsen(self, source: int, entries: int) -> bool:
        """Let the units of a source be ones of which an axis of ``entries`` has whole ones."""
        root = self.root(source)
        if entries % self.units[root] == 0:
            return True
        if self.units[root] % entries:
            return False
        self.units[root] = entries
        return True

    def unite(self, a: Value, b: Value) -> bool:
        """Let the entries of two values go together; False if they do not correspond."""
        if [each.entries for each in a.segments] != [each.entries for each in b.segments]:
            return False
        for x, y in zip(a.segments, b.segments, strict=True):
            first, second = self.root(x.source), self.root(y.source)
            if not self.coarsen(first, self.units[second]) or not self.coarsen(second, self.units[first]):
                return False
            self.parent[second] = first
        return True

    def aligned(self, node: Any, inputs: list[Any]) -> Value | None:
        """The value of a result whose axes line up with those of its inputs, counted from the last.

        ``zero`` holds where it holds for all inputs; a constant along the axis counts as one that is not.
        """
        tracked = [each for each in inputs if each in self.values]
        axes = {self.values[each].axis - dim_of(each) for each in tracked}
        if len(axes) != 1:
            return None
        (axis,) = axes
        first = self.values[tracked[0]]
        zero = True
        for each in inputs:
            if each not in self.values:
                zero = False
                if dim_of(each) >= -axis and shape_of(each)[axis] != 1:
                    self.write(first)
                continue
            value = self.values[each]
            zero = zero and value.zero
            if value is not first and not self.unite(first, value):
                return None
        return Value(dim_of(node) + axis, first.segments, zero)


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a node's tensor."""
    return tuple(int(size) for size in node.meta["val"].shape)


def dim_of(node: Any) -> int:
    """Number of axes of a node's tensor."""
    return int(node.meta["val"].dim())


def argument(node: Any, index: int, name: str, default: Any = None) -> Any:
    """An argument of an operation."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)
