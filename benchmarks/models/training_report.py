"""Results of `benchmarks.training` as a table and as a JSON file."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import geometric_mean
from benchmarks.models.zoo import MANY, ONE

__all__ = ["APPLE", "OURS", "PLUGIN", "Result", "TrainingReport", "print_report", "targets"]

SCHEMA = 1
OURS, APPLE, PLUGIN = "ours", "apple", "plugin"  # the last: Apple's with the engine under it
# An overhead below this share of the float step is not told from none.
LEAST_OVERHEAD = 0.002
MEAN_WANTED, EACH_WANTED, MANY_WANTED, PLUGIN_WANTED = 1 / 5, 1 / 2, 3.0, 1.1


@dataclass
class Result:
    """A model's training step under one config.

    Attributes:
        model: its name.
        config: its name.
        threads: that torch was allowed.
        simulators: in the prepared model.
        float_seconds: by package, a step of the unprepared model in the same process.
        seconds: by package, a step of the prepared one.
        overhead: by package, the median over the rounds of their difference.
        same_losses: whether all packages' first losses agree bit for bit; None without Apple's package.
    """

    model: str
    config: str
    threads: int
    simulators: int
    float_seconds: dict[str, float]
    seconds: dict[str, float]
    overhead: dict[str, float]
    same_losses: bool | None

    def slowdown(self, package: str) -> float:
        """The quantized step over the float one; NaN if not measured."""
        if package not in self.seconds:
            return math.nan
        return self.seconds[package] / self.float_seconds[package]

    def visible_overhead(self, package: str) -> float:
        """The overhead, or the least that can be told from none; NaN if not measured."""
        if package not in self.overhead:
            return math.nan
        return max(self.overhead[package], LEAST_OVERHEAD * self.float_seconds[package])

    @property
    def ratio(self) -> float:
        """Our overhead over Apple's; NaN without Apple's."""
        return self.visible_overhead(OURS) / self.visible_overhead(APPLE)


@dataclass
class TrainingReport:
    """All that a run found out."""

    machine: dict[str, Any]
    command: str
    seconds: float
    results: list[Result]

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        data = {"schema": SCHEMA, **asdict(self), "targets": targets(self.results)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "TrainingReport":
        """Read a JSON file; ValueError if it has another schema."""
        data = json.loads(path.read_text())
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"{path} was written by another version; this one reads schema {SCHEMA}")
        data.pop("targets")
        return cls(**data | {"results": [Result(**result) for result in data["results"]]})


def targets(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row a number of threads and target that was measured: what was wanted, and what was reached."""
    rows: list[dict[str, Any]] = []
    by_threads: dict[int, list[Result]] = {}
    for result in results:
        by_threads.setdefault(result.threads, []).append(result)
    for threads, group in by_threads.items():
        ratios = [(r.ratio, f"{r.model}, {r.config}") for r in _models(group) if not math.isnan(r.ratio)]
        if ratios:
            mean, (most, where) = geometric_mean(ratio for ratio, _ in ratios), max(ratios)
            rows.append(_row("overhead / Apple's, geometric mean", threads, MEAN_WANTED, mean))
            rows.append(_row("overhead / Apple's, most", threads, EACH_WANTED, most, where))
        plugin = [r.seconds[PLUGIN] / r.seconds[OURS] for r in _models(group) if PLUGIN in r.seconds]
        if plugin:
            rows.append(
                _row(
                    "the plugin's step / ours, geometric mean", threads, PLUGIN_WANTED, geometric_mean(plugin)
                )
            )
        many, one = ({r.config: r for r in group if r.model == name} for name in (MANY, ONE))
        for config in many.keys() & one.keys():
            ratio = many[config].visible_overhead(OURS) / one[config].visible_overhead(OURS)
            rows.append(_row(f"overhead of {MANY} / {ONE}", threads, MANY_WANTED, ratio, config))
    return rows


def _models(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result.model not in (MANY, ONE)]


def _row(name: str, threads: int, wanted: float, reached: float, where: str = "") -> dict[str, Any]:
    row = {"target": name, "threads": threads, "wanted": wanted, "reached": reached, "where": where}
    return row | {"met": reached <= wanted}


def print_report(report: TrainingReport, console: Console) -> None:
    """Print the tables: steps, and targets."""
    console.print(_steps_table(report.results))
    rows = targets(report.results)
    if rows:
        console.print(_targets_table(rows))
    facts = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    console.print(f"{facts}; {report.seconds:.0f} s", markup=False, highlight=False)


def _steps_table(results: Iterable[Result]) -> Table:
    caption = (
        "times in ms, medians; overhead: quantized minus float, within a round; ÷: over the float step; "
        "plugin: the engine under Apple's package"
    )
    table = Table(title="Training steps", title_justify="left", caption=caption, caption_justify="left")
    for heading in ("model", "config"):
        table.add_column(heading, no_wrap=True)
    figures = ("float", "ours", "÷", "plugin", "÷", "Apple's", "÷", "overhead", "plugin", "Apple's", "ratio")
    for heading in ("threads", "simulators", *figures):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("losses")
    agree = {True: "same", False: "[bold red]differ[/]", None: ""}
    for result in results:
        table.add_row(
            *(result.model, result.config, str(result.threads), str(result.simulators)),
            _milliseconds(result.float_seconds[OURS]),
            *(
                figure
                for package in (OURS, PLUGIN, APPLE)
                for figure in (
                    _milliseconds(result.seconds.get(package, math.nan)),
                    _number(result.slowdown(package)),
                )
            ),
            *(_milliseconds(result.overhead.get(package, math.nan)) for package in (OURS, PLUGIN, APPLE)),
            *(_number(result.ratio, 3), agree[result.same_losses]),
        )
    return table


def _targets_table(rows: Iterable[dict[str, Any]]) -> Table:
    table = Table(title="Targets", title_justify="left")
    for heading in ("target", "threads", "at most", "reached", "met", "where"):
        table.add_column(heading, justify="left" if heading in ("target", "met", "where") else "right")
    for row in rows:
        met = "[green]yes[/]" if row["met"] else "[bold red]no[/]"
        figures = (str(row["threads"]), _number(row["wanted"]), _number(row["reached"], 3))
        table.add_row(row["target"], *figures, met, row["where"])
    return table


def _number(value: float, digits: int = 2) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _milliseconds(seconds: float) -> str:
    return _number(seconds * 1e3, 2)
