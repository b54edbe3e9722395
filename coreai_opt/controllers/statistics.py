"""Facts about compressed models, as tables and as plain data."""

import dataclasses
import io
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = [
    "AlgorithmStatistics",
    "CompressionStatistics",
    "ConstSparsityStatistics",
    "FilterPruningStatistics",
    "KnowledgeDistillationStatistics",
    "LayerPalette",
    "LayerPruning",
    "LayerQuantization",
    "LayerSparsity",
    "MagnitudeSparsityStatistics",
    "MovementSparsityStatistics",
    "PalettizationStatistics",
    "QuantizationStatistics",
    "RBSparsityStatistics",
    "SharedUnits",
    "SparsityStatistics",
]

_WIDTH = 100


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one weight: the share of its elements that are masked."""

    name: str
    shape: tuple[int, ...]
    sparsity: float


@dataclass(frozen=True)
class LayerQuantization:
    """How one tensor is quantized. ``bits`` is None for a tensor that passes unquantized now."""

    name: str
    tensor: str
    bits: int
    scheme: str
    granularity: str
    enabled: bool


@dataclass(frozen=True)
class LayerPruning:
    """Filters of one layer."""

    name: str
    filters: int
    pruned: int
    cluster: int


@dataclass(frozen=True)
class SharedUnits:
    """Attention heads, or feed-forward dimensions, that the ``layers`` share."""

    layers: str
    units: int
    masked: int


@dataclass(frozen=True)
class LayerPalette:
    """Palette of one weight."""

    name: str
    shape: tuple[int, ...]
    bits: int
    enabled: bool


@dataclass(frozen=True)
class AlgorithmStatistics:
    """Base: scalar fields make a table of two columns, a list of records a table of its own."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, with records as dicts."""
        return dataclasses.asdict(self)

    def to_str(self) -> str:
        """The tables."""
        name = type(self).__name__.removesuffix("Statistics")
        scalars = Table("quantity", "value", title=name, box=box.ASCII2)
        tables = [scalars]
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, list):
                tables.extend(_record_table(entry.name, value))
            else:
                scalars.add_row(entry.name.replace("_", " "), _shown(value))
        return _rendered(tables)


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


@dataclass(frozen=True)
class SparsityStatistics(AlgorithmStatistics):
    """Sparsity of the masked weights together and one by one.

    Fields:
        sparsity_of_masked_weights: masked elements ÷ elements of the weights that have a mask.
        sparsity_of_model: masked elements ÷ elements of all parameters.
        level: what the schedule asks for.
        target_level: what it will ask for.
        layers: the weights.
    """

    sparsity_of_masked_weights: float
    sparsity_of_model: float
    level: float
    target_level: float
    layers: list[LayerSparsity] = field(default_factory=list)


@dataclass(frozen=True)
class MagnitudeSparsityStatistics(SparsityStatistics):
    """See the base."""


@dataclass(frozen=True)
class RBSparsityStatistics(SparsityStatistics):
    """See the base; an element counts as masked if evaluation masks it."""


@dataclass(frozen=True)
class MovementSparsityStatistics(SparsityStatistics):
    """See the base; the levels are the threshold's progress from 0 to 1."""

    structures: list[SharedUnits] = field(default_factory=list)


@dataclass(frozen=True)
class ConstSparsityStatistics(SparsityStatistics):
    """See the base."""


@dataclass(frozen=True)
class QuantizationStatistics(AlgorithmStatistics):
    """Quantized tensors. ``compression_rate``: bits saved ÷ bits of the same weights before."""

    preset: str
    compression_rate: float
    quantized_weights: int
    quantized_activations: int
    tensors: list[LayerQuantization] = field(default_factory=list)


@dataclass(frozen=True)
class FilterPruningStatistics(AlgorithmStatistics):
    """Pruned filters, and what they save. A multiplication with an addition counts as two FLOPs."""

    pruning_level: float
    target_level: float
    share_of_filters: float
    flops: int
    full_flops: int
    parameters: int
    full_parameters: int
    layers: list[LayerPruning] = field(default_factory=list)


@dataclass(frozen=True)
class PalettizationStatistics(AlgorithmStatistics):
    """Palettized weights. ``compression_rate``: bits saved ÷ bits of the same weights before."""

    compression_rate: float
    layers: list[LayerPalette] = field(default_factory=list)


@dataclass(frozen=True)
class KnowledgeDistillationStatistics(AlgorithmStatistics):
    """The last loss before scaling to the task's; None before the first."""

    loss_type: str
    scale: float
    last_loss: float | None


@dataclass(frozen=True)
class CompressionStatistics:
    """One entry an algorithm, None for those that are not there."""

    magnitude_sparsity: MagnitudeSparsityStatistics | None = None
    rb_sparsity: RBSparsityStatistics | None = None
    movement_sparsity: MovementSparsityStatistics | None = None
    const_sparsity: ConstSparsityStatistics | None = None
    quantization: QuantizationStatistics | None = None
    filter_pruning: FilterPruningStatistics | None = None
    palettization: PalettizationStatistics | None = None
    knowledge_distillation: KnowledgeDistillationStatistics | None = None

    def _present(self) -> dict[str, Any]:
        every = ((entry.name, getattr(self, entry.name)) for entry in dataclasses.fields(self))
        return {name: value for name, value in every if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, by algorithm."""
        return {name: value.to_dict() for name, value in self._present().items()}

    def to_str(self) -> str:
        """The tables of all algorithms."""
        return "\n\n".join(value.to_str() for value in self._present().values())

    def __str__(self) -> str:
        """The same as :meth:`to_str`."""
        return self.to_str()

    def merged(self, other: "CompressionStatistics") -> "CompressionStatistics":
        """The entries of both; those of ``other`` win."""
        return dataclasses.replace(self, **other._present())
