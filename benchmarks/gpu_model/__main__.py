"""``python -m benchmarks.gpu_model``: instructions an element, and the bandwidth that they allow.

Of each variant and compiler. Without nvcc there are no rows of CUDA C++.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.gpu_model import cuda
from benchmarks.gpu_model.devices import DEVICES
from benchmarks.gpu_model.model import shares
from benchmarks.gpu_model.names import CUDA, TRITON
from benchmarks.gpu_model.plot import save_plot
from benchmarks.gpu_model.variants import Variant, variants

__all__ = ["main", "row_of"]

ARCHS = sorted({device.arch for device in DEVICES.values()})
_LEFT = ("operation", "case", "dtype", "compiler")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="TEXT", help="variants whose names contain all of these"
    )
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write all figures; those of variants not chosen are kept"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="draw the shares (a name that matplotlib knows)"
    )
    arguments = parser.parse_args(argv)
    chosen = [each for each in variants() if all(text in each.name for text in arguments.only)]
    if not chosen:
        parser.error(f"--only {' '.join(arguments.only)} chooses no variant")
    if cuda.nvcc() is None:
        print("nvcc was not found: the kernels in CUDA C++ are left out", file=sys.stderr)
        chosen = [each for each in chosen if each.compiler != CUDA]
    rows = _rows(chosen)
    Console(width=230).print(_table(rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = _write(rows, arguments.json)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        save_plot(rows, arguments.plot)
    return 0


def _write(rows: Sequence[dict[str, Any]], path: Path) -> Sequence[dict[str, Any]]:
    """Write rows, a line each, beside those of other variants that the file has; returns all."""
    found = {_key(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    # As they are read back: numbers as keys become text.
    found |= {_key(row): row for row in json.loads(json.dumps(rows))}
    order = [(each.operation, each.case, each.dtype, each.compiler) for each in variants()]
    kept = [found[key] for key in order if key in found]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in kept)
    path.write_text(f'{{"compilers": {json.dumps(_compilers())}, "rows": [\n{lines}\n]}}\n')
    return kept


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in _LEFT)


def _compilers() -> dict[str, str]:
    compiler = cuda.nvcc()
    found = {TRITON: triton.__version__}
    if compiler is not None:
        printed = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        found[CUDA] = "nvcc " + printed.partition("release ")[2].partition(",")[0]
    return found


def _rows(chosen: Sequence[Variant]) -> list[dict[str, Any]]:
    units = cuda.units(body for variant in chosen for body in variant.bodies)
    total = len(ARCHS) * (len(units) + sum(variant.run is not None for variant in chosen))
    rows = []
    with tqdm(total=total, unit="compilation", disable=None) as bar:
        for unit in units:
            for arch in ARCHS:
                cuda.kernels(unit, arch)
                bar.update()
        for variant in chosen:
            rows.append(row_of(variant))
            if variant.run is not None:
                bar.update(len(ARCHS))
    return rows


def row_of(variant: Variant) -> dict[str, Any]:
    """All figures of a variant."""
    kernels = {arch: variant.kernels(arch) for arch in ARCHS}
    moved = variant.read + variant.written
    reached = {name: shares(kernels[device.arch], moved, name) for name, device in DEVICES.items()}
    return {
        "operation": variant.operation,
        "case": variant.case,
        "dtype": variant.dtype,
        "compiler": variant.compiler,
        "bytes": moved,
        "budget": variant.budget,
        "instructions": {arch: sum(each.instructions for each in found) for arch, found in kernels.items()},
        "kernels": [asdict(each) for of_arch in kernels.values() for each in of_arch],
        "devices": reached,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    title = (
        "Instructions an element on the main path, and the share of the copy bandwidth that it allows"
        " (kernels, registers, occupancy and KiB in flight a multiprocessor: H100)"
    )
    table = Table(title=title, title_justify="left")
    archs = [f"sm_{arch}" for arch in ARCHS]
    headings = (*_LEFT, "kernels", *archs, "budget", "bytes", "registers", "occupancy", "in flight", *DEVICES)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in _LEFT else "right")
    for row in rows:
        kernels = [each for each in row["kernels"] if each["arch"] == DEVICES["H100"].arch]
        h100 = row["devices"]["H100"]
        table.add_row(
            *(row[name] for name in _LEFT),
            str(len(kernels)),
            *(f"{row['instructions'][arch]:.1f}" for arch in ARCHS),
            str(row["budget"] or ""),
            f"{sum(each['bytes_loaded'] + each['bytes_stored'] for each in kernels):.2f}",
            str(max(each["registers"] for each in kernels)),
            f"{h100['occupancy']:.0%}",
            f"{h100['kib_in_flight']:.0f}",
            *(f"{each['share']:.0%} {each['bound']}" for each in row["devices"].values()),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
