"""What the model says, drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_model.devices import DEVICES

__all__ = ["save_plot"]

_LABEL = "share of the copy bandwidth that the machine code allows (a model, not a measurement)"
_MARKS = {"fp32": "o", "bf16": "s"}


def save_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each GPU: the share of the copy bandwidth, by variant, compiler and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(_name(row) for row in rows))
    compilers = list(dict.fromkeys(row["compiler"] for row in rows))
    size = (12, 1.2 + 0.17 * len(names))
    figure, panels = pyplot.subplots(
        1,
        len(DEVICES),
        figsize=size,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, device in zip(panels[0], DEVICES, strict=True):
        for i, compiler in enumerate(compilers):
            for dtype, mark in _MARKS.items():
                chosen = [row for row in rows if (row["compiler"], row["dtype"]) == (compiler, dtype)]
                panel.scatter(
                    [row["devices"][device]["share"] for row in chosen],
                    [names.index(_name(row)) for row in chosen],
                    s=16,
                    marker=mark,
                    edgecolors=f"C{i}",
                    facecolors="none" if dtype == "fp32" else f"C{i}",
                    label=f"{compiler}, {dtype}",
                )
        panel.set_title(device)
        panel.set_xlim(0, 1.05)
        panel.grid(alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0][0].invert_yaxis()
    figure.supxlabel(_LABEL, fontsize=9)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    with pyplot.rc_context({"svg.hashsalt": "coreai-opt", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _name(row: dict[str, Any]) -> str:
    return ", ".join(filter(None, (row["operation"], row["case"])))
