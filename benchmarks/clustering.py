"""Palettizing one large weight, ours against Apple's package: ``python -m benchmarks.clustering``."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.apple import Apple
from benchmarks.clustering_run import cluster
from benchmarks.turns import add_options, in_turns, measured

__all__ = ["main", "measure"]

# The least ratio that is wanted, by dtype and granularity; None where there is no target.
WANTED = {
    ("float16", "tensor"): 10.0,
    ("bfloat16", "tensor"): 10.0,
    ("float32", "tensor"): None,
    ("float32", "half zeros"): None,
    ("float32", "groups"): 5.0,
    ("bfloat16", "groups"): None,
}


def measure(size: int, n_bits: int, threads: int, rounds: int, apple: Apple | None) -> list[dict[str, Any]]:
    """Medians over ``rounds`` in which both packages take turns, and the errors that they leave."""
    rows = []
    for (dtype, granularity), wanted in tqdm(WANTED.items(), unit="case", disable=None):
        case = {
            "size": size,
            "dtype": dtype,
            "granularity": granularity,
            "n_bits": n_bits,
            "threads": threads,
        }
        theirs = None if apple is None else partial(apple.cluster, **case)
        row = case | {"wanted": wanted} | in_turns(rounds, partial(cluster, **case), theirs)
        if theirs is not None:
            row["error_ratio"] = row["ours"]["error"] / row["apple"]["error"]
        rows.append(row)
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Palettization of one weight: seconds of prepare()", title_justify="left")
    for heading in (
        "dtype",
        "palettes",
        "size",
        "bits",
        "threads",
        "ours",
        "Apple's",
        "ratio",
        "wanted",
        "errors",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        compared = "apple" in row
        table.add_row(
            *(row["dtype"], row["granularity"], f"{row['size']}²", str(row["n_bits"]), str(row["threads"])),
            f"{row['ours']['seconds']:.3f}",
            f"{row['apple']['seconds']:.3f}" if compared else "",
            f"{row['ratio']:.1f}×" if compared else "",
            f"{row['wanted']:.0f}×" if row["wanted"] else "",
            f"{row['error_ratio']:.7f}" if compared else "",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clustering", description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    add_options(parser)
    arguments = parser.parse_args(argv)
    rows = measured(
        lambda apple: measure(arguments.size, arguments.bits, arguments.threads, arguments.rounds, apple),
        arguments,
        "benchmarks.clustering",
        argv,
    )
    Console(width=110).print(_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
