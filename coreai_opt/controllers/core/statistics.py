"""Facts about compressed models, as tables and as plain data."""

import dataclasses
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from coreai_opt._utils.registry_utils import ClassRegistryMixin

__all__ = ["AlgorithmStatistics", "CompressionStatistics", "LeftWhole", "table_of"]

_WIDTH = 100


@dataclass(frozen=True)
class LeftWhole:
    """Something that the configuration asks for and that is not compressed, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class AlgorithmStatistics(ClassRegistryMixin):
    """Base of an algorithm's statistics, which a subclass registers under the algorithm's name.

    Scalar fields make a table of two columns, a list of records a table of its own.

    Fields:
        left_whole: what the algorithm was to compress, and cannot safely.
    """

    left_whole: list[LeftWhole] = field(default_factory=list, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields, with records as dicts."""
        return dataclasses.asdict(self)

    def to_str(self) -> str:
        """The tables."""
        name = type(self).__name__.removesuffix("Statistics")
        scalars = Table("quantity", "value", title=name, box=box.ASCII2)
        tables = [scalars]
        for entry in sorted(dataclasses.fields(self), key=lambda each: bool(each.kw_only)):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                tables.extend(_record_table(entry.name, value))
            else:
                scalars.add_row(entry.name.replace("_", " "), _shown(value))
        return _rendered(tables)


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in plain characters."""
    table = Table(*columns, title=title, box=box.ASCII2)
    for row in rows:
        table.add_row(*row)
    return _rendered([table])


def _record_table(name: str, records: list[Any]) -> list[Table]:
    if not records:
        return []
    columns = [entry.name for entry in dataclasses.fields(records[0])]
    table = Table(*columns, title=name.replace("_", " "), box=box.ASCII2)
    for record in records:
        table.add_row(*(_shown(getattr(record, column)) for column in columns))
    return [table]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rendered(tables: list[Table]) -> str:
    text = io.StringIO()
    console = Console(file=text, width=_WIDTH, color_system=None)
    for table in tables:
        console.print(table)
    return text.getvalue().rstrip("\n")


class CompressionStatistics:
    """The statistics of the algorithms on a model.

    ``statistics.quantization`` are those of that algorithm, None if it is not there. A name that neither has
    an entry nor is registered raises AttributeError.

    Args:
        entries: by name of the algorithm; those that are None count as not there.
    """

    def __init__(self, **entries: AlgorithmStatistics | None) -> None:
        self._entries = {name: value for name, value in entries.items() if value is not None}

    def __getattr__(self, name: str) -> Any:
        """The entry of an algorithm."""
        entries = self.__dict__.get("_entries", {})
        if name in entries:
            return entries[name]
        if name in AlgorithmStatistics.list_registry_keys():
            return None
        known = sorted({*entries, *AlgorithmStatistics.list_registry_keys()})
        raise AttributeError(f"{type(self).__name__} has no entry {name!r}; its algorithms are {known}")

    def __eq__(self, other: object) -> bool:
        """Whether the entries are equal."""
        return self._entries == other._entries if isinstance(other, CompressionStatistics) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, by algorithm."""
        return {name: value.to_dict() for name, value in self._entries.items()}

    def to_str(self) -> str:
        """The tables of all algorithms."""
        return "\n\n".join(value.to_str() for value in self._entries.values())

    def __str__(self) -> str:
        """The same as :meth:`to_str`."""
        return self.to_str()

    def __repr__(self) -> str:
        """The algorithms and their statistics."""
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in self._entries.items())})"

    def merged(self, other: "CompressionStatistics") -> "CompressionStatistics":
        """The entries of both; those of ``other`` win."""
        return CompressionStatistics(**{**self._entries, **other._entries})
