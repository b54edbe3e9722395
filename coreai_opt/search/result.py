"""What a search found: the choice, the numbers behind it, and what to do with it."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from coreai_opt._utils.svg import curve
from coreai_opt._utils.writing import write_text
from coreai_opt.config.compression_config import CompressionConfig
from coreai_opt.search.candidates import Candidate, configurations, prepared
from coreai_opt.search.measuring import Measurement

__all__ = ["SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """The candidate of each layer.

    Attributes:
        choice: by the layer's name; None for a layer that stays as it is.
        bits_per_weight: of the whole model, as :func:`coreai_opt.inspection.bits_per_weight` counts.
        damage: of the whole model with this choice, measured.
        measurements: of each candidate in each layer.
        front: bits per weight and summed damage of the best choices for all budgets, from the smallest on.
        uniform: by the candidate's name, bits per weight and measured damage with that candidate everywhere.
        method: how the choice was found: ``"optimal"``, ``"greedy"``, or ``"uniform"`` where one candidate
            everywhere turned out to do less damage.
    """

    choice: Mapping[str, Candidate | None]
    bits_per_weight: float
    damage: float
    measurements: tuple[Measurement, ...]
    front: tuple[tuple[float, float], ...]
    uniform: Mapping[str, tuple[float, float]]
    method: str

    def configs(self) -> dict[str, CompressionConfig[Any]]:
        """The configurations of the compressors, by kind: one for each kind of candidate that was chosen."""
        return configurations({re.escape(layer): candidate for layer, candidate in self.choice.items()})

    def prepare(self, model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> nn.Module:
        """A copy of the model, prepared as chosen.

        Args:
            model: the model that was searched, or one with its layers.
            example_inputs: positional arguments for one forward, or a mapping of keyword arguments.
        """
        return prepared(model, self.configs(), example_inputs)

    def rows(self) -> list[dict[str, Any]]:
        """One row a measurement: layer, candidate, bits, damage, and whether it was chosen."""
        return [
            {
                "layer": each.layer,
                "candidate": each.candidate,
                "bits": each.bits,
                "damage": each.damage,
                "chosen": self._name(each.layer) == each.candidate,
            }
            for each in self.measurements
        ]

    def to_csv(self, path: str | Path) -> None:
        """Write :meth:`rows` to a file."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, ["layer", "candidate", "bits", "damage", "chosen"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

    def table(self) -> str:
        """The choice as text: a line a layer, and the whole model."""
        table = Table(title=f"{self.method} choice: {self.bits_per_weight:.3f} bits per weight")
        for heading in ("layer", "candidate", "bits", "damage alone"):
            table.add_column(heading, overflow="fold")
        chosen = {(each.layer, each.candidate): each for each in self.measurements}
        for layer in self.choice:
            name = self._name(layer)
            found = chosen.get((layer, name or ""))
            if found is None:
                table.add_row(escape(layer), "as it is", "", "")
            else:
                candidate = escape(found.candidate)
                table.add_row(escape(layer), candidate, str(found.bits), f"{found.damage:.3g}")
        table.add_section()
        table.add_row("whole model", "", "", f"{self.damage:.3g}")
        console = Console(width=110, highlight=False, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get()

    def plot(self, path: str | Path) -> None:
        """Write the front, this choice, and the uniform ones as an SVG drawing."""
        marks = [(self.bits_per_weight, self.damage, self.method)]
        marks += [(bits, damage, name) for name, (bits, damage) in self.uniform.items()]
        write_text(path, curve(self.front, marks, "bits per weight", "damage"))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return {
            "method": self.method,
            "bits_per_weight": self.bits_per_weight,
            "damage": self.damage,
            "choice": {layer: self._name(layer) for layer in self.choice},
            "uniform": {name: list(point) for name, point in self.uniform.items()},
            "front": [list(point) for point in self.front],
            "measurements": self.rows(),
        }

    def _name(self, layer: str) -> str | None:
        candidate = self.choice[layer]
        return None if candidate is None else candidate.name
