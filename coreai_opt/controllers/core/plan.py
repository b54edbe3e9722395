"""What a training run will do to a model, told before it starts."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreai_opt.controllers.core.statistics import table_of

__all__ = ["Plan", "PlannedChange"]

_BAR = 30


@dataclass(frozen=True)
class PlannedChange:
    """Something that changes at the beginning of a step.

    Fields:
        epoch, step: of the epoch, from 0.
        algorithm: whose.
        what: changes.
        level: the level from then on; None where there is none.
    """

    epoch: int
    step: int
    algorithm: str
    what: str
    level: float | None = None


@dataclass(frozen=True)
class Plan:
    """The changes of a run, in their order.

    Fields:
        epochs: of the run.
        changes: in the order of time.
    """

    epochs: int
    changes: list[PlannedChange]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    def to_str(self) -> str:
        """A table, with a bar for each level."""
        rows = [
            (
                str(each.epoch),
                str(each.step),
                each.algorithm,
                each.what,
                "" if each.level is None else f"{each.level:.4g}",
                "" if each.level is None else "#" * round(_BAR * min(max(each.level, 0.0), 1.0)),
            )
            for each in self.changes
        ]
        title = f"plan of {self.epochs} epochs"
        return table_of(title, ("epoch", "step", "algorithm", "what", "level", ""), rows)

    def __str__(self) -> str:
        """The same as :meth:`to_str`."""
        return self.to_str()

    def plot(self, path: str | Path) -> None:
        """Draw the levels over the epochs into a picture.

        Args:
            path: of the file; its ending says which kind.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("a plot needs matplotlib: pip install matplotlib") from error
        steps = 1 + max((each.step for each in self.changes), default=0)
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.subplots()
        for algorithm in dict.fromkeys(each.algorithm for each in self.changes):
            mine = [each for each in self.changes if each.algorithm == algorithm]
            points = [(each.epoch + each.step / steps, each.level) for each in mine if each.level is not None]
            if points:
                times, levels = zip(*points, strict=True)
                axes.step([*times, self.epochs], [*levels, levels[-1]], where="post", label=algorithm)
            for each in mine:
                if each.level is None:
                    axes.axvline(each.epoch + each.step / steps, linestyle=":", color="gray")
                    axes.annotate(each.what, (each.epoch, 0.02), rotation=90, fontsize=7)
        axes.set(
            xlabel="epoch", ylabel="level", xlim=(0, max(self.epochs, 1)), ylim=(0, math.nextafter(1.05, 2))
        )
        if axes.has_data() and axes.get_legend_handles_labels()[0]:
            axes.legend()
        figure.savefig(path)
