"""Results of `benchmarks.training` as a picture: quantized over float step, ours beside Apple's."""

import math
from pathlib import Path

from benchmarks.models.training_report import APPLE, OURS, PLUGIN, TrainingReport

__all__ = ["save_plot"]

_COLOURS = {OURS: "#0b6e99", PLUGIN: "#6fb3c9", APPLE: "#e08a1e"}
_LABELS = {OURS: "ours", PLUGIN: "Apple's with the engine under it", APPLE: "Apple's coreai-opt 0.4.0"}
_WIDTH = 0.27


def save_plot(report: TrainingReport, path: Path) -> None:
    """Write a PNG: a panel for each config, mode and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((result.threads, result.config, result.mode) for result in report.results))
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(12, 3.2 * len(panels)), squeeze=False, layout="constrained"
    )
    machine = report.machine
    figure.suptitle(
        f"Training step, quantized over float; {machine['cpu']}, {machine['isa']}, torch {machine['torch']}, "
        f"{machine['date']}",
        fontsize=11,
    )
    for axis, panel in zip(axes.flat, panels, strict=True):
        threads, config, mode = panel
        results = [r for r in report.results if (r.threads, r.config, r.mode) == panel]
        for place, package in enumerate((OURS, PLUGIN, APPLE), -1):
            heights = [result.slowdown(package) for result in results]
            if all(map(math.isnan, heights)):
                continue
            bars = axis.bar(
                [index + place * _WIDTH for index in range(len(results))],
                heights,
                0.95 * _WIDTH,
                color=_COLOURS[package],
                label=_LABELS[package],
            )
            axis.bar_label(bars, [f"{height:.2f}×" for height in heights], fontsize=8)
        axis.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(results)), [result.model for result in results])
        axis.set_title(
            f"{config}, {mode}, {threads} thread{'s' if threads > 1 else ''}", loc="left", fontsize=10
        )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}×")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
