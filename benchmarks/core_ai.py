"""Compressing a Core AI program's weights, ours against Apple's package: ``python -m benchmarks.core_ai``."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.apple import Apple
from benchmarks.core_ai_run import PASSES, compress_program
from benchmarks.turns import add_options, in_turns, measured

__all__ = ["main", "measure"]


def measure(layers: int, width: int, threads: int, rounds: int, apple: Apple | None) -> list[dict[str, Any]]:
    """Medians over ``rounds`` in which both packages take turns."""
    rows = []
    for name in tqdm(PASSES, unit="case", disable=None):
        case = {"name": name, "layers": layers, "width": width, "threads": threads}
        theirs = None if apple is None else partial(apple.compress_program, **case)
        rows.append(case | in_turns(rounds, partial(compress_program, **case), theirs))
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    weights = rows[0]["layers"] * rows[0]["width"] ** 2 / 1e6
    table = Table(title=f"A Core AI program of {weights:.1f} M weights: seconds", title_justify="left")
    for heading in ("compression", "threads", "ours", "Apple's", "ratio"):
        table.add_column(heading, justify="left" if heading == "compression" else "right")
    for row in rows:
        compared = "apple" in row
        table.add_row(
            *(row["name"], str(row["threads"]), f"{row['ours']['seconds']:.3f}"),
            f"{row['apple']['seconds']:.3f}" if compared else "",
            f"{row['ratio']:.1f}×" if compared else "",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core_ai", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=2048, help="of the linear layers")
    add_options(parser)
    arguments = parser.parse_args(argv)
    rows = measured(
        lambda apple: measure(arguments.layers, arguments.width, arguments.threads, arguments.rounds, apple),
        arguments,
        "benchmarks.core_ai",
        argv,
    )
    Console(width=110).print(_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
