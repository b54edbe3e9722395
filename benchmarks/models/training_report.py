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
from benchmarks.models.training_step import COMPILED, EAGER, GRAPH
from benchmarks.models.zoo import MANY, ONE

__all__ = ["APPLE", "OURS", "PLUGIN", "Result", "TrainingReport", "print_report", "targets"]

SCHEMA = 2
OURS, APPLE, PLUGIN = "ours", "apple", "plugin"  # the last: Apple's with the engine under it
# An overhead below this share of the float step is not told from none.
LEAST_OVERHEAD = 0.002
MEAN_WANTED = {EAGER: 1 / 5, GRAPH: 0.15, COMPILED: 0.15}
EACH_WANTED, MANY_WANTED, PLUGIN_WANTED = 1 / 2, 3.0, 1.1


@dataclass
class Result:
    """A model's training step under one config.

    Attributes:
        model: its name.
        config: its name.
        mode: of execution; graphs may be compiled.
        threads: that torch was allowed.
        simulators: in the prepared model.
        float_seconds: by package, a step of the unprepared model in the same process.
        seconds: by package, a step of the prepared one.
        overhead: by package, the median over the rounds of their difference.
        same_losses: whether all packages' first losses agree bit for bit; None without Apple's package, and
            for compiled graphs.
    """

    model: str
    config: str
    mode: str
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
        schema = data.pop("schema")
        if schema not in (1, SCHEMA):
            raise ValueError(f"{path} was written by another version; this one reads schema {SCHEMA}")
        data.pop("targets")
        # Before there were others.
        mode = {"mode": EAGER} if schema == 1 else {}
        return cls(**data | {"results": [Result(**mode | result) for result in data["results"]]})


def targets(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One row a number of threads and target that was measured: what was wanted, and what was reached."""
    rows: list[dict[str, Any]] = []
    by_threads: dict[int, list[Result]] = {}
    for result in results:
        by_threads.setdefault(result.threads, []).append(result)
    for threads, group in by_threads.items():
        for mode, wanted in MEAN_WANTED.items():
            own = [r for r in _models(group) if r.mode == mode and not math.isnan(r.ratio)]
            if own:
                most = max(own, key=lambda r: r.ratio)
                mean = geometric_mean(r.ratio for r in own)
                rows.append(_row(f"{mode}: overhead / Apple's, geometric mean", threads, wanted, mean))
                place = f"{most.model}, {most.config}"
                rows.append(
                    _row(f"{mode}: overhead / Apple's, most", threads, EACH_WANTED, most.ratio, place)
                )
        across = _against_compiled(_models(group))
        if across:
            name = f"{GRAPH}: overhead / Apple's {COMPILED}'s, geometric mean"
            rows.append(_row(name, threads, MEAN_WANTED[COMPILED], geometric_mean(across)))
        eager = [r for r in _models(group) if r.mode == EAGER]
        plugin = [r.seconds[PLUGIN] / r.seconds[OURS] for r in eager if PLUGIN in r.seconds]
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


def _against_compiled(results: Iterable[Result]) -> list[float]:
    """Our overhead in graph mode, without the compiler, over that of Apple's graph with it."""
    by_mode = {(r.model, r.config, r.mode): r for r in results}
    return [
        by_mode[model, config, GRAPH].visible_overhead(OURS) / result.visible_overhead(APPLE)
        for (model, config, mode), result in by_mode.items()
        if mode == COMPILED and (model, config, GRAPH) in by_mode and APPLE in result.overhead
    ]


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
    for heading in ("model", "config", "mode"):
        table.add_column(heading, no_wrap=True)
    figures = ("float", "ours", "÷", "plugin", "÷", "Apple's", "÷", "overhead", "plugin", "Apple's", "ratio")
    for heading in ("threads", "simulators", *figures):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("losses")
    agree = {True: "same", False: "[bold red]differ[/]", None: ""}
    for result in results:
        table.add_row(
            *(result.model, result.config, result.mode, str(result.threads), str(result.simulators)),
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
