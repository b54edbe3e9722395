"""A run's results as tables and as a JSON file, and their comparison with an older run's."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import geometric_mean
from benchmarks.harness import COPY, MULTIPLY, NATIVE, Result

__all__ = ["SCHEMA", "Report", "print_comparison", "print_report"]

SCHEMA = 1
_RIVALS = ("reference", "torch", "compile", "apple", "plugin", "nncf", "singly", "one tensor", MULTIPLY)
_STYLES = {"yes": "green", "on average": "yellow", "no": "bold red"}
_CHANGE_WORTH_A_ROW = 1.1
_LEGEND = """\
Times in µs. GB/s: the least traffic over our time. Of floor: the time of a copy of as many bytes over ours.
Memory that outputs lie in: warm = touched before; allocator = as torch's allocator gives it, mostly touched
before; fresh = new pages from the system at each call. The reference runs up to 2048².\
"""


@dataclass
class Report:
    """All that a run found out."""

    machine: dict[str, Any]
    command: str
    seconds: float
    results: list[Result]
    targets: list[dict[str, Any]]
    memory: list[dict[str, Any]]

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        data = {
            "schema": SCHEMA,
            "machine": self.machine,
            "command": self.command,
            "seconds": self.seconds,
            "results": [result.as_json() for result in self.results],
            "targets": self.targets,
            "memory": self.memory,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a JSON file; ValueError if it has another schema."""
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} has schema {data.get('schema')}; this version reads {SCHEMA}")
        results = [Result.from_json(result) for result in data.pop("results")]
        del data["schema"]
        return cls(results=results, **data)


def print_report(report: Report, console: Console, *, details: bool = True) -> None:
    """Print the tables: cases, summary, memory, targets."""
    if details:
        console.print(_LEGEND, markup=False, highlight=False)
        for (op, phase, variant), group in _grouped(report.results, lambda c: (c.op, c.phase, c.variant)):
            console.print(_details_table(", ".join(filter(None, (op, phase, variant))), group))
    if report.results:
        console.print(_summary_table(report.results))
    if report.memory:
        console.print(_memory_table(report.memory))
    notes = _notes(report.results)
    if notes:
        console.print("\n".join(["Notes:", *notes]), markup=False, highlight=False)
    if report.targets:
        console.print(_targets_table(report.targets))
    facts = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    console.print(f"{facts}; {report.seconds:.0f} s", markup=False, highlight=False)


def _grouped(
    results: Iterable[Result], key: Callable[[Any], tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], list[Result]]]:
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result.case)].append(result)
    return list(groups.items())


def _rivals_of(results: Sequence[Result]) -> list[str]:
    return [name for name in _RIVALS if any(name in result.seconds for result in results)]


def _number(value: float, scale: float = 1.0, suffix: str = "") -> str:
    if math.isnan(value):
        return ""
    value *= scale
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 2)}f}{suffix}"


def _table(title: str, left: Sequence[str], right: Sequence[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _details_table(title: str, results: Sequence[Result]) -> Table:
    rivals = _rivals_of(results)
    times = [NATIVE, *rivals]
    headings = [*times, "floor", "GB/s", "of floor", *(f"{name}/ours" for name in rivals)]
    table = _table(title, ["format", "granularity", "dtype", "memory"], ["size", "threads", *headings])
    for result in results:
        case = result.case
        table.add_row(
            *(case.format, case.granularity, case.dtype, result.memory, f"{case.size}²", str(case.threads)),
            *(_number(result.seconds.get(name, math.nan), 1e6) for name in times),
            _number(result.floor_seconds, 1e6),
            _number(result.gigabytes_per_second),
            _number(result.share_of_floor, 100, " %"),
            *(_number(result.ratio(name)) for name in rivals),
        )
    return table


def _summary_table(results: Sequence[Result]) -> Table:
    rivals = _rivals_of(results)
    headings = [*(f"{name}/ours" for name in rivals), "least", "of floor"]
    caption = "geometric means of all cases; least: smallest ratio to Apple's; of floor: from 1024² on"
    table = _table("Summary", ["operation", "format"], ["threads", "cases", *headings], caption)
    groups = _grouped(results, lambda c: (c.op, c.phase, c.variant, c.format, c.threads))
    for (op, phase, variant, fmt, threads), group in groups:
        apple = [result.ratio("apple") for result in group if "apple" in result.seconds]
        large = [r.share_of_floor for r in group if r.case.size >= 1024 and not math.isnan(r.share_of_floor)]
        table.add_row(
            *(", ".join(filter(None, (op, phase, variant))), fmt, str(threads), str(len(group))),
            *(_number(_mean_ratio(group, name)) for name in rivals),
            _number(min(apple, default=math.nan)),
            _number(geometric_mean(large), 100, " %"),
        )
    return table


def _mean_ratio(results: Iterable[Result], name: str) -> float:
    ratios = (result.ratio(name) for result in results)
    return geometric_mean(ratio for ratio in ratios if not math.isnan(ratio))


def _memory_table(rows: Sequence[dict[str, Any]]) -> Table:
    caption = "bytes an element. Peak: output and gradient included. Saved: from forward to backward"
    headings = ["peak, ours", "peak, Apple's", "saved, ours", "saved, Apple's"]
    table = _table("Memory of a training step", ["simulator"], headings, caption)
    for row in rows:
        figures = [
            row.get(whose, {}).get(name, math.nan)
            for name in ("peak_per_element", "saved_per_element")
            for whose in ("ours", "apple")
        ]
        table.add_row(row["name"], *map(_number, figures))
    return table


def _targets_table(rows: Sequence[dict[str, Any]]) -> Table:
    headings = ["threads", "wanted", "each", "reached", "least", MULTIPLY, "cases"]
    caption = (
        "wanted, reached: geometric mean; each, least: single cases; "
        f"{MULTIPLY}: what torch's product with one would reach in its place, forward and backward"
    )
    table = _table("Targets", ["target"], headings, caption)
    table.add_column("met")
    table.add_column("least is")
    for row in rows:
        scale, suffix = (100, " %") if row["unit"] == "%" else (1, "×")
        wanted = (row["mean_wanted"], row["each_wanted"], row["mean"], row["least"])
        met = f"[{_STYLES[row['met']]}]{row['met']}[/]"
        figures = [_number(value, scale, suffix) for value in (*wanted, row.get("product", math.nan))]
        worst = escape(row["worst_case"].replace("/", " ").strip())
        table.add_row(row["target"], str(row["threads"]), *figures, str(row["cases"]), met, worst)
    return table


def _notes(results: Iterable[Result]) -> list[str]:
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for result in results:
        for note in result.notes:
            counts[result.case.op, note] += 1
    return [f"  {op}: {note} ({count} cases)" for (op, note), count in counts.items()]


def print_comparison(new: Report, old: Report, console: Console) -> None:
    """Print how much faster this run is than ``old``: old time over new time of the native backend."""
    for fact in ("cpu", "isa", "torch", "huge_pages"):
        if new.machine.get(fact) != old.machine.get(fact):
            change = f"{old.machine.get(fact)} then, {new.machine.get(fact)} now"
            console.print(f"Not the same {fact}: {change}", style="yellow", markup=False)
    before = {result.case.key: result for result in old.results if NATIVE in result.seconds}
    pairs = [(before[r.case.key], r) for r in new.results if r.case.key in before and NATIVE in r.seconds]
    table = _table(
        f"Against {old.machine.get('date')}: speed-up",
        ["operation"],
        ["threads", "cases", "native", "least", "most", "copy"],
        "old time / new time: above 1 is faster now. copy: the machine's own change",
    )
    groups: dict[tuple[str, str, int], list[tuple[Result, Result]]] = defaultdict(list)
    for pair in pairs:
        case = pair[1].case
        groups[case.op, case.phase, case.threads].append(pair)
    for (op, phase, threads), group in groups.items():
        gains = [a.seconds[NATIVE] / b.seconds[NATIVE] for a, b in group]
        copies = [a.seconds[COPY] / b.seconds[COPY] for a, b in group]
        figures = (geometric_mean(gains), min(gains), max(gains), geometric_mean(copies))
        name = ", ".join(filter(None, (op, phase)))
        table.add_row(name, str(threads), str(len(group)), *map(_number, figures))
    console.print(table)
    _print_changes(pairs, console)


def _print_changes(pairs: Iterable[tuple[Result, Result]], console: Console) -> None:
    gains = [(a.seconds[NATIVE] / b.seconds[NATIVE], b.case) for a, b in pairs]
    changed = [(gain, case) for gain, case in gains if max(gain, 1 / gain) >= _CHANGE_WORTH_A_ROW]
    if not changed:
        console.print(f"No case changed by a factor of {_CHANGE_WORTH_A_ROW} or more.")
        return
    table = _table(f"Changed by a factor of {_CHANGE_WORTH_A_ROW} or more", ["case"], ["old / new"])
    for gain, case in sorted(changed, key=lambda item: item[0]):
        table.add_row(escape(case.key.replace("/", " ").strip()), _number(gain))
    console.print(table)
