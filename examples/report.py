"""The table and the plots of ``digits_qat.py``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from digits_model import Digits
from matplotlib.axes import Axes
from quantized_model import Size
from rich.console import Console
from rich.table import Table
from torch import Tensor

TITLES = {
    "float32": "float32",
    "rounded": "rounded,\nno training",
    "fused": "QAT,\nfused",
    "reference": "QAT,\nreference",
    "graph": "QAT,\ngraph",
    "sparse75": "pruned,\n75 %",
    "sparse24": "pruned,\n2:4",
}
COLOURS = {
    "float32": "#7f7f7f",
    "rounded": "#e69f00",
    "fused": "#0072b2",
    "reference": "#d55e00",
    "graph": "#56b4e9",
    "sparse75": "#009e73",
    "sparse24": "#cc79a7",
}


@dataclass(frozen=True)
class Result:
    """Facts of one model. ``seconds`` and ``peak`` (bytes) are those of a training step, if it has any.

    ``zeros`` is the fraction of the weights that are zero, where the model was pruned.
    """

    accuracy: float
    loss: float
    size: Size
    zeros: float | None
    seconds: float | None
    peak: int | None
    predictions: Tensor


@dataclass(frozen=True)
class Report:
    """Results by model; training losses and sparsities (a step each), test accuracies (an epoch each)."""

    results: dict[str, Result]
    curves: dict[str, tuple[list[float], list[float]]]
    sparsities: dict[str, list[float]]


def print_table(report: Report, console: Console) -> None:
    table = Table(
        title="Handwritten digits: int4 weights and int8 activations, or pruned weights",
        caption="QAT and pruning add epochs to the float32 training: part of their gain comes from them.",
    )
    table.add_column("")
    for name in report.results:
        table.add_column(TITLES[name], justify="right")

    def add(label: str, text: Callable[[Result], str]) -> None:
        table.add_row(label, *(text(result) for result in report.results.values()))

    base = report.results["float32"]
    add("test accuracy", lambda r: f"{r.accuracy:.2%}")
    add("test loss", lambda r: f"{r.loss:.4f}")
    table.add_section()
    add("model size (bytes)", lambda r: f"{r.size.total:,}")
    add("  packed weights", lambda r: f"{r.size.weights:,}" if r.size.weights else "–")
    add("  their scales, or masks", lambda r: f"{r.size.scales:,}" if r.size.scales else "–")
    add("  the rest, float32", lambda r: f"{r.size.rest:,}")
    add("  smaller than float32", lambda r: f"{base.size.total / r.size.total:.2f} ×")
    add("weights that are zero", lambda r: f"{r.zeros:.1%}" if r.zeros is not None else "–")
    table.add_section()
    add("median step time (ms)", lambda r: f"{1e3 * r.seconds:.1f}" if r.seconds else "–")
    add("  simulation adds (ms)", lambda r: f"{1e3 * (r.seconds - base.seconds):.1f}" if r.seconds else "–")
    add("peak memory of a step (MiB)", lambda r: f"{r.peak / 2**20:.1f}" if r.peak else "–")
    console.print(table)


def write_plots(report: Report, data: Digits, path: Path) -> None:
    """Training curves, costs of a step, and digits that the models read differently, as a PNG."""
    figure = plt.figure(figsize=(13, 15), layout="constrained")
    figure.suptitle("Quantization-aware training and pruning on digits", size=15)
    top, pruning, middle, bottom = figure.subfigures(4, 1, height_ratios=[1.15, 1, 1, 0.85])

    loss_axes, accuracy_axes = top.subplots(1, 2)
    _plot_curves(report, loss_axes, accuracy_axes)

    _plot_pruning(report, *pruning.subplots(1, 2))

    time_axes, memory_axes, size_axes = middle.subplots(1, 3)
    results = report.results
    times = {name: 1e3 * r.seconds for name, r in results.items() if r.seconds}
    peaks = {name: r.peak / 2**20 for name, r in results.items() if r.peak}
    sizes = {name: r.size.total / 1024 for name, r in results.items() if name not in ("rounded", "reference")}
    _plot_bars(time_axes, "median training step (ms)", times)
    _plot_bars(memory_axes, "peak memory of a step (MiB)", peaks)
    _plot_bars(size_axes, "model size (KiB)", sizes)

    _plot_digits(report, data, bottom.subplots(1, 8))
    bottom.suptitle("Test images that rounding misreads or QAT reads otherwise", size=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_curves(report: Report, loss_axes: Axes, accuracy_axes: Axes) -> None:
    start, start_epoch = 0, 0
    for name, (losses, accuracies) in report.curves.items():
        if name in report.sparsities:
            continue
        # Both QAT runs continue the float one on the same line: dashes over a broad one show both.
        style = {"color": COLOURS[name], "label": TITLES[name].replace("\n", " ")}
        style |= {"reference": {"linestyle": "--", "linewidth": 1.6}, "fused": {"linewidth": 4}}.get(name, {})
        loss_axes.plot(np.arange(start, start + len(losses)) + 1, losses, **style)
        epochs = np.arange(start_epoch, start_epoch + len(accuracies)) + 1
        accuracy_axes.plot(epochs, [100 * a for a in accuracies], **style)
        if name == "float32":
            start, start_epoch = len(losses), len(accuracies)
    rounded = 100 * report.results["rounded"].accuracy
    accuracy_axes.plot(
        [start_epoch], [rounded], "o", color=COLOURS["rounded"], markersize=9, label="rounded, no training"
    )
    loss_axes.set(title="training loss", xlabel="step", yscale="log")
    # The first epochs, near chance, would flatten the differences that matter.
    lowest = min(rounded, 100 * min(report.curves["fused"][1]))
    accuracy_axes.set(title="test accuracy (%)", xlabel="epoch", ylim=(lowest - 6, 100.5))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()


def _plot_pruning(report: Report, level_axes: Axes, accuracy_axes: Axes) -> None:
    for name, levels in report.sparsities.items():
        style = {"color": COLOURS[name], "label": TITLES[name].replace("\n", " ")}
        level_axes.plot(np.arange(len(levels)) + 1, [100 * level for level in levels], **style)
        accuracies = [100 * accuracy for accuracy in report.curves[name][1]]
        accuracy_axes.plot(np.arange(len(accuracies)) + 1, accuracies, "o-", **style)
    before = 100 * report.results["float32"].accuracy
    accuracy_axes.axhline(before, color=COLOURS["float32"], linestyle="--", label="float32, before")
    level_axes.set(title="pruned weights (%)", xlabel="step", ylim=(0, 100))
    accuracy_axes.set(title="test accuracy while pruning (%)", xlabel="epoch")
    accuracy_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (level_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()


def _plot_bars(axes: Axes, title: str, values: dict[str, float]) -> None:
    names = [TITLES[name] for name in values]
    bars = axes.bar(names, list(values.values()), color=[COLOURS[name] for name in values], width=0.6)
    axes.bar_label(bars, fmt="{:,.1f}", padding=2)
    axes.set_title(title)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_digits(report: Report, data: Digits, grid: np.ndarray) -> None:
    read = {name: report.results[name].predictions for name in ("float32", "rounded", "fused")}
    differs = (read["rounded"] != data.test_labels).int() + (read["fused"] != read["rounded"]).int()
    for axes, index in zip(grid, differs.argsort(descending=True, stable=True).tolist(), strict=False):
        axes.imshow(data.test_images[index, 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"is a {data.test_labels[index]}", size=11)
        float_digit, rounded_digit, qat_digit = (int(digits[index]) for digits in read.values())
        axes.set_xlabel(f"float {float_digit}\nrounded {rounded_digit}\nQAT {qat_digit}", size=10)
