"""Units that linear layers share: attention heads and feed-forward dimensions.

A feed-forward dimension is a row of the first layer and a column of the second. Where the features are split
into heads that attention treats one by one, a head is a block of rows of query, key and value, and of columns
of the output projection.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from coreai_opt.controllers.structures.follow import follow

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
    # A masked unit is one that its readers mask, too: that it is zero on the way does not matter.
    state = follow(model, args, kwargs, only_zero=False)
    fixed = {state.root(source) for source in state.fixed}
    written = {state.root(source) for source in state.written}
    rows: dict[int, list[str]] = {}
    columns: dict[int, list[str]] = {}
    for source, names in state.producers.items():
        rows.setdefault(state.root(source), []).extend(names)
    for name, segments in state.consumers.items():
        for segment in segments:
            columns.setdefault(state.root(segment.source), []).append(name)
            if len(segments) > 1:  # features of several sources side by side are no blocks of equal size
                fixed.add(state.root(segment.source))
    for segments, _ in state.followers.values():
        fixed.update(state.root(segment.source) for segment in segments)
    structures = []
    for root in sorted(rows.keys() - fixed):
        reading = columns.get(root, [])
        if reading and state.units[root] > 1 and layers.issuperset(rows[root] + reading):
            mine = tuple(dict.fromkeys(rows[root])), tuple(reading)
            structures.append(Structure(state.units[root], *mine, root not in written))
    return structures
