"""Palettes of vectors, ours against the best of several of Apple's: ``python -m
benchmarks.vector_clustering``.

Apple's package finds them by chance, so that its errors differ from seed to seed. Ours are the same every
time.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.apple import Apple
from benchmarks.facts import save_rows
from benchmarks.vector_clustering_run import KINDS, cluster_vectors

__all__ = ["KINDS", "main", "measure"]


def measure(
    cases: Sequence[tuple[int, str, int, int]], seeds: int, threads: int, apple: Apple | None
) -> list[dict[str, Any]]:
    """Of each ``(size, kind, dim, bits)``, ours and Apple's in turns, once a seed."""
    rows = []
    for size, kind, dim, n_bits in tqdm(cases, unit="case", disable=None):
        case = {"kind": kind, "size": size, "dim": dim, "n_bits": n_bits, "threads": threads}
        ours, theirs = [], []
        for seed in range(seeds):
            ours.append(cluster_vectors(**case, seed=seed))
            if apple is not None:
                theirs.append(apple.cluster_vectors(**case, seed=seed))
        row: dict[str, Any] = case | {"ours": _summary(ours)}
        if theirs:
            row["apple"] = _summary(theirs)
            row["excess"] = row["ours"]["worst"] / row["apple"]["best"] - 1
            row["ratio"] = row["apple"]["seconds"] / row["ours"]["seconds"]
        rows.append(row)
    return rows


def _summary(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    errors = [run["error"] for run in runs]
    seconds = statistics.median(run["seconds"] for run in runs)
    return {"seconds": seconds, "best": min(errors), "mean": statistics.fmean(errors), "worst": max(errors)}


def _table(rows: Sequence[dict[str, Any]], seeds: int) -> Table:
    title = f"Palettes of vectors: errors against the best of Apple's in {seeds} runs, and median time"
    table = Table(title=title, title_justify="left")
    for heading in (
        "weights",
        "size",
        "dim",
        "bits",
        "ours",
        "Apple's",
        "ratio",
        "Apple's mean",
        "our error",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row["kind"], f"{row['size']}²", str(row["dim"]), str(row["n_bits"])]
        cells.append(f"{1e3 * row['ours']['seconds']:.1f} ms")
        if "apple" in row:
            cells += [f"{1e3 * row['apple']['seconds']:.1f} ms", f"{row['ratio']:.1f}×"]
            cells.append(f"{100 * (row['apple']['mean'] / row['apple']['best'] - 1):+.3f} %")
            cells.append(f"{100 * row['excess']:+.4f} %")
        table.add_row(*cells)
    return table


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    compared = [row for row in rows if "apple" in row]
    if not compared:
        return "Apple's package was not run."
    greater = [row["excess"] for row in compared if row["excess"] > 1e-6]
    slower = [row for row in compared if row["ratio"] < 1]
    worst = f", by {100 * max(greater):.3f} % at most" if greater else ""
    ratio = statistics.median(row["ratio"] for row in compared)
    return (
        f"Of {len(compared)} cases, the error is greater than Apple's best in {len(greater)}{worst}; "
        f"slower in {len(slower)}; median time ratio {ratio:.1f}."
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vector_clustering", description=__doc__)
    parser.add_argument("--sizes", type=_numbers, default=[32, 64, 128, 256], metavar="N,N")
    parser.add_argument(
        "--kinds", type=lambda text: text.split(","), default=list(KINDS), metavar="KIND,KIND"
    )
    parser.add_argument("--dims", type=_numbers, default=[2, 4], metavar="D,D")
    parser.add_argument("--bits", type=_numbers, default=[2, 3, 4, 6], metavar="B,B")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--apple", default=".oracle", metavar="PATH", help="folder with it, or 'none'")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    arguments = parser.parse_args(argv)
    apple = None if arguments.apple == "none" else Apple(Path(arguments.apple))
    cases = list(itertools.product(arguments.sizes, arguments.kinds, arguments.dims, arguments.bits))
    try:
        rows = measure(cases, arguments.seeds, arguments.threads, apple)
    finally:
        if apple is not None:
            apple.close()
    console = Console(width=110)
    console.print(_table(rows, arguments.seeds))
    console.print(_verdict(rows))
    if arguments.json:
        save_rows(arguments.json, "benchmarks.vector_clustering", argv, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
