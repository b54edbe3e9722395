"""``python -m benchmarks.gpu_model``: instructions an element, and the bandwidth that they allow."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.gpu_model.devices import DEVICES
from benchmarks.gpu_model.model import examine, shares
from benchmarks.gpu_model.variants import variants

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="variants whose name contains it")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="draw the shares (a name that matplotlib knows)"
    )
    arguments = parser.parse_args(argv)
    chosen = [each for each in variants() if arguments.only in f"{each.operation}, {each.case}, {each.dtype}"]
    if not chosen:
        parser.error(f"--only {arguments.only!r} chooses no variant")
    rows = []
    for variant in tqdm(chosen, unit="variant", disable=None):
        kernels = {arch: examine(variant, arch) for arch in sorted({each.arch for each in DEVICES.values()})}
        reached = {name: shares(variant, kernels[device.arch], name) for name, device in DEVICES.items()}
        rows.append(
            {
                "operation": variant.operation,
                "case": variant.case,
                "dtype": variant.dtype,
                "kernels": [asdict(each) for of_arch in kernels.values() for each in of_arch],
                "devices": reached,
            }
        )
    Console(width=150).print(_table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        _plot(rows, arguments.plot)
    return 0


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A row of bars for each variant: the share of the copy bandwidth on each device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.4 * len(rows)), layout="constrained")
    height = 0.8 / len(DEVICES)
    for i, name in enumerate(DEVICES):
        places = [row + i * height for row in range(len(rows))]
        axes.barh(places, [row["devices"][name]["share"] for row in rows], height, label=name)
    labels = [", ".join(filter(None, (row["operation"], row["case"], row["dtype"]))) for row in rows]
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("share of the copy bandwidth (a model, not a measurement)")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    title = "Main path of the kernels for sm_90, and the share of the copy bandwidth that it allows"
    table = Table(title=title, title_justify="left")
    for heading in ("operation", "case", "dtype", "kernels", "instructions", "bytes", "registers", *DEVICES):
        table.add_column(heading, justify="left" if heading in ("operation", "case", "kernels") else "right")
    for row in rows:
        kernels = [each for each in row["kernels"] if each["arch"] == 90]
        table.add_row(
            *(row["operation"], row["case"], row["dtype"], ", ".join(each["name"] for each in kernels)),
            f"{sum(each['instructions'] for each in kernels):.1f}",
            f"{sum(each['bytes_loaded'] + each['bytes_stored'] for each in kernels):.2f}",
            str(max(each["registers"] for each in kernels)),
            *(f"{each['share']:.0%} {each['bound']}" for each in row["devices"].values()),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
