"""A run's results as a picture: ratios to Apple's package, and shares of the floor, by size."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import INT_FORMATS, geometric_mean
from benchmarks.harness import Result
from benchmarks.report import Report
from benchmarks.simulation import FORWARD, TRAINING
from benchmarks.targets import KERNELS

__all__ = ["save_plot"]

_SIMULATORS: dict[str, tuple[Sequence[str], str]] = {
    "int, forward": (INT_FORMATS, FORWARD),
    "int, forward + backward": (INT_FORMATS, TRAINING),
    "fp8, forward + backward": (("fp8 e4m3",), TRAINING),
    "fp4, forward + backward": (("fp4 e2m1",), TRAINING),
}
_COLOURS = ("#0b6e99", "#7fb7d4", "#e08a1e", "#8a5aa8")

Predicate = Callable[[Result], bool]
Series = Mapping[str, Mapping[int, Sequence[float]]]


def save_plot(report: Report, path: Path) -> None:
    """Write a PNG: a row of panels for each number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = sorted({result.case.threads for result in report.results}) or [1]
    figure, axes = pyplot.subplots(
        len(threads), 2, figsize=(16, 4.8 * len(threads)), squeeze=False, layout="constrained"
    )
    machine = report.machine
    figure.suptitle(
        f"{machine['cpu']}, {machine['isa']}, torch {machine['torch']}, {machine['date']}\n"
        "bars: geometric means over fp32, bf16 and granularities; whiskers: least and most",
        fontsize=12,
    )
    for row, count in zip(axes, threads, strict=True):
        results = [result for result in report.results if result.case.threads == count]
        label = f"{count} thread{'s' if count > 1 else ''}"
        _draw(row[0], _ratios(results), f"Simulator: Apple's time / ours, {label}", "{:.0f}×", 1.0)
        row[0].set_yscale("log")
        row[0].yaxis.set_major_formatter("{x:g}×")
        _draw(row[1], _shares(results), f"Kernels alone: share of the floor, {label}", "{:.0%}", 0.7)
        row[1].yaxis.set_major_formatter("{x:.0%}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _series(results: Sequence[Result], belongs: Predicate, value: Callable[[Result], float]) -> Any:
    figures: dict[int, list[float]] = {}
    for result in results:
        if belongs(result) and not math.isnan(value(result)):
            figures.setdefault(result.case.size, []).append(value(result))
    return figures


def _ratios(results: Sequence[Result]) -> Series:
    def belongs_to(formats: Sequence[str], phase: str) -> Predicate:
        wanted = ("simulator", phase, "static")
        return lambda r: (r.case.op, r.case.phase, r.case.variant) == wanted and r.case.format in formats

    return {
        name: _series(results, belongs_to(*group), lambda result: result.ratio("apple"))
        for name, group in _SIMULATORS.items()
    }


def _shares(results: Sequence[Result]) -> Series:
    def belongs_to(op: str) -> Predicate:
        return lambda result: result.case.op == op

    return {op: _series(results, belongs_to(op), lambda result: result.share_of_floor) for op in KERNELS}


def _draw(axis: Any, series: Series, title: str, label: str, line: float) -> None:
    axis.set_title(title, fontsize=12, loc="left")
    sizes = sorted({size for figures in series.values() for size in figures})
    if not sizes:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    width = 0.8 / len(series)
    for index, ((name, figures), colour) in enumerate(zip(series.items(), _COLOURS, strict=True)):
        if not figures:
            continue
        shown = [size for size in sizes if size in figures]
        means = [geometric_mean(figures[size]) for size in shown]
        positions = [sizes.index(size) + (index - (len(series) - 1) / 2) * width for size in shown]
        # A mean of one value may differ from it in the last digit.
        below = [max(0.0, mean - min(figures[size])) for mean, size in zip(means, shown, strict=True)]
        above = [max(0.0, max(figures[size]) - mean) for mean, size in zip(means, shown, strict=True)]
        axis.bar(positions, means, width * 0.94, label=name, color=colour)
        axis.errorbar(
            positions, means, (below, above), fmt="none", elinewidth=0.8, ecolor="#444444", capsize=2
        )
        for position, mean, most in zip(positions, means, above, strict=True):
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
            axis.annotate(label.format(mean), (position, mean + most), fontsize=8, **place)
    axis.axhline(line, color="#444444", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(sizes)), [f"{size}²" for size in sizes])
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, ncols=2, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.07))
