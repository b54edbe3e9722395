"""Clusters of convolutions whose filters go together, and whether that is safe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from coreai_opt.controllers.core.layers import CONVOLUTIONS
from coreai_opt.controllers.structures.follow import follow
from coreai_opt.controllers.structures.trace import Call, Segment

__all__ = ["Channels", "Cluster", "Span", "find_channels"]


@dataclass(frozen=True)
class Span:
    """``entries`` neighbouring entries of an axis: those of a cluster, or ones that stay (None)."""

    cluster: int | None
    entries: int


@dataclass
class Cluster:
    """Layers that lose the same output channels.

    Fields:
        size: units; each is as many neighbouring channels as a layer has for it, mostly one.
        producers: convolutions whose filters they are.
        followers: layers with parameters for each channel: depthwise convolutions, norms, PReLUs.
        reads_input: whether a producer reads the model's input.
        strided: whether a producer reduces the resolution.
        written: whether the program spells out the number of channels somewhere.
    """

    size: int
    producers: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    reads_input: bool = False
    strided: bool = False
    written: bool = False


@dataclass(frozen=True)
class Run:
    """One run of a layer, see :class:`.trace.Call`, in spans; None for an axis that stays whole."""

    layer: str
    coefficient: int
    outputs: tuple[Span, ...]
    inputs: tuple[Span, ...]


@dataclass(frozen=True)
class Channels:
    """The channels of a model.

    Fields:
        clusters: those that can be removed.
        producers, consumers, followers: for each layer, the spans of its output, of its input, and of the
            axis that its parameters follow; a follower also has a number of outputs for each input.
        runs: of convolutions and linear layers.
        whole: convolutions that belong to no cluster, and why.
    """

    clusters: list[Cluster]
    producers: dict[str, tuple[Span, ...]]
    consumers: dict[str, tuple[Span, ...]]
    followers: dict[str, tuple[Span, ...]]
    runs: list[Run]
    whole: dict[str, str]

    def only(self, numbers: Sequence[int]) -> "Channels":
        """The same with some of the clusters alone; the channels of the others stay."""
        new: Mapping[int | None, int] = {old: index for index, old in enumerate(numbers)}

        def kept(spans: tuple[Span, ...]) -> tuple[Span, ...]:
            return tuple(Span(new.get(span.cluster), span.entries) for span in spans)

        return Channels(
            [self.clusters[number] for number in numbers],
            {name: kept(spans) for name, spans in self.producers.items()},
            {name: kept(spans) for name, spans in self.consumers.items()},
            {name: kept(spans) for name, spans in self.followers.items()},
            [Run(e.layer, e.coefficient, kept(e.outputs), kept(e.inputs)) for e in self.runs],
            self.whole,
        )


def find_channels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Channels:
    """The clusters whose channels can be removed, and the layers that read them.

    Channels that reach the model's output, or an operation that is not known to treat each of them alone, are
    left out.

    Args:
        model: the uncompressed model; it stays as it is.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.

    Raises:
        ValueError: the model cannot be exported.
    """
    state = follow(model, args, kwargs)
    fixed: dict[int, str] = {}
    for source, reason in state.fixed.items():
        fixed.setdefault(state.root(source), reason)
    whole: dict[str, str] = {}
    members: dict[int, list[str]] = {}
    for source, layers in state.producers.items():
        members.setdefault(state.root(source), []).extend(layers)
    for root, layers in members.items():
        linear = [name for name in layers if not isinstance(state.model.get_submodule(name), CONVOLUTIONS)]
        if linear:
            fixed.setdefault(root, f"the linear layer {linear[0]!r} makes them, too")
        if root in fixed:
            whole.update(dict.fromkeys(layers, fixed[root]))
    roots = sorted(members.keys() - fixed.keys())
    numbers = {root: number for number, root in enumerate(roots)}

    def spans(segments: tuple[Segment, ...] | None, times: int = 1) -> tuple[Span, ...]:
        return tuple(
            Span(numbers.get(state.root(each.source)), each.entries * times) for each in segments or ()
        )

    clusters = [Cluster(state.units[root], list(dict.fromkeys(members[root]))) for root in roots]
    producers: dict[str, tuple[Span, ...]] = {
        name: (Span(numbers.get(state.root(source)), state.channels[source]),)
        for source, layers in state.producers.items()
        for name in layers
    }
    followers = {name: spans(segments, times) for name, (segments, times) in state.followers.items()}
    for name, its in followers.items():
        for span in its:
            if span.cluster is not None and name not in clusters[span.cluster].followers:
                clusters[span.cluster].followers.append(name)
    for sources, flag in (
        (state.first, "reads_input"),
        (state.strided, "strided"),
        (state.written, "written"),
    ):
        for source in sources:
            number = numbers.get(state.root(source))
            if number is not None:
                setattr(clusters[number], flag, True)
    consumers = {name: spans(segments) for name, segments in state.consumers.items()}
    return Channels(clusters, producers, consumers, followers, [_run(e, spans) for e in state.calls], whole)


def _run(call: Call, spans: Any) -> Run:
    outputs = spans(call.outputs) or (Span(None, call.output_entries),)
    inputs = spans(call.inputs) or (Span(None, call.input_entries),)
    return Run(call.layer, call.coefficient, outputs, inputs)
