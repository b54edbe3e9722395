"""Calls of several packages in turns: medians, ratios and spreads, and the options of a command for them."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.apple import Apple
from benchmarks.facts import save_rows
from benchmarks.harness import spread_of
from benchmarks.timing import seconds_per_call

__all__ = ["add_options", "in_turns", "measured", "processor_seconds", "steps_in_turns"]

Call = Callable[[], dict[str, float]]


def in_turns(rounds: int, ours: Call, theirs: Call | None) -> dict[str, Any]:
    """Medians over ``rounds`` of what the calls return: under ``"ours"``, and ``"apple"`` where it is there.

    ``"ratio"`` is that of their ``"seconds"``.
    """
    found: dict[str, list[dict[str, float]]] = {"ours": []} | ({} if theirs is None else {"apple": []})
    for _ in range(rounds):
        found["ours"].append(ours())
        if theirs is not None:
            found["apple"].append(theirs())
    row: dict[str, Any] = {name: _median(runs) for name, runs in found.items()}
    if theirs is not None:
        row["ratio"] = row["apple"]["seconds"] / row["ours"]["seconds"]
    return row


def _median(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def processor_seconds(step: Callable[[], Any], calls: int) -> float:
    """Processor time of a call, in seconds, after an untimed one."""
    return seconds_per_call(step, calls, untimed_call=True, clock=time.process_time)


def steps_in_turns(
    steps: Mapping[str, Callable[[], Any]], calls: Mapping[str, int], rounds: int
) -> dict[str, dict[str, float]]:
    """Processor time of each contender's step.

    Args:
        steps: by contender.
        calls: how often each is called in a turn.
        rounds: turns.

    Returns:
        By contender, under ``"seconds"`` the medians and under ``"spread"`` what :func:`spread_of` gives.
    """
    times = [[processor_seconds(step, calls[who]) for who, step in steps.items()] for _ in range(rounds)]
    columns = dict(zip(steps, zip(*times, strict=True), strict=True))
    return {
        "seconds": {who: statistics.median(column) for who, column in columns.items()},
        "spread": {who: spread_of(column) for who, column in columns.items()},
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that such commands share."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apple", default=".oracle", metavar="PATH", help="folder with it, or 'none'")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")


def measured(
    measure: Callable[[Apple | None], list[dict[str, Any]]],
    arguments: argparse.Namespace,
    module: str,
    argv: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows that ``measure`` gives with Apple's package, or None for it; written where asked for."""
    apple = None if arguments.apple == "none" else Apple(Path(arguments.apple))
    try:
        rows = measure(apple)
    finally:
        if apple is not None:
            apple.close()
    if arguments.json:
        save_rows(arguments.json, module, argv, rows)
    return rows
