"""What the project set out to reach, and what was reached."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import INT_FORMATS, geometric_mean
from benchmarks.harness import MULTIPLY, Result
from benchmarks.pruning import PRUNING
from benchmarks.simulation import FORWARD, TRAINING

__all__ = ["KERNELS", "TARGETS", "Target", "evaluate"]

KERNELS = ("fake_quantize", "fake_quantize_backward", "observe_and_fake_quantize", "observe_range")
"""The operations whose floor ``LIMITS`` knows, and that large models spend their time in."""

# Below, a call is short enough for the dispatcher to count.
_KERNELS_FROM_SIZE = 1024


def _apple_ratio(result: Result) -> float:
    return result.ratio("apple")


def _share_of_floor(result: Result) -> float:
    return result.share_of_floor


def _share_of_the_plugin(result: Result) -> float:
    return 1 / result.ratio("plugin")


@dataclass(frozen=True)
class Target:
    """A bound for the geometric mean of a group of cases, and one for each of them.

    Attributes:
        name: what it is about.
        mean: least geometric mean.
        each: least value of a single case.
        belongs: whether a result is of the group.
        value: the figure that is bounded.
        scales: whether half is enough with AVX2 only.
        unit: how to print the figures.
    """

    name: str
    mean: float
    each: float
    belongs: Callable[[Result], bool]
    value: Callable[[Result], float] = _apple_ratio
    scales: bool = True
    unit: str = "×"


def _simulator(formats: Sequence[str], phase: str, low: int, high: int) -> Callable[[Result], bool]:
    def belongs(result: Result) -> bool:
        case = result.case
        return (
            (case.op, case.phase, case.variant) == ("simulator", phase, "static")
            and case.format in formats
            and low <= case.size <= high
        )

    return belongs


def _kernel(op: str) -> Callable[[Result], bool]:
    def belongs(result: Result) -> bool:
        return result.case.op == op and result.case.size >= _KERNELS_FROM_SIZE and result.memory == "warm"

    return belongs


def _masks(granularities: Sequence[str]) -> Callable[[Result], bool]:
    def belongs(result: Result) -> bool:
        case = result.case
        return case.op == PRUNING and case.granularity in granularities and case.size >= _KERNELS_FROM_SIZE

    return belongs


def _targets() -> Iterator[Target]:
    fp8, fp4 = ("fp8 e4m3",), ("fp4 e2m1",)
    rows = (
        ("int4 and int8", INT_FORMATS, FORWARD, (18, 8), 6),
        ("int4 and int8", INT_FORMATS, TRAINING, (12, 6), 5),
        ("fp8", fp8, FORWARD, (12, 12), 6),
        ("fp8", fp8, TRAINING, (12, 12), 6),
        ("fp4 in e8m0 blocks", fp4, FORWARD, (50, 50), 30),
        ("fp4 in e8m0 blocks", fp4, TRAINING, (50, 50), 30),
    )
    for name, formats, phase, (mean, each), large in rows:
        yield Target(f"{name}, {phase}, 256² to 2048²", mean, each, _simulator(formats, phase, 256, 2048))
        yield Target(f"{name}, {phase}, 4096²", large, large, _simulator(formats, phase, 4096, 4096))
    small = _simulator((*INT_FORMATS, *fp8, *fp4), TRAINING, 64, 64)
    yield Target("host time: all formats, forward+backward, 64²", 8, 8, small, scales=False)
    for op in KERNELS:
        name = f"share of the floor: {op}, from 1024²"
        yield Target(name, 0.7, 0.7, _kernel(op), _share_of_floor, scales=False, unit="%")
    yield Target(
        "the drop-in / the plugin, simulators",
        *(1 / 1.1, 1 / 1.25),
        lambda result: result.case.op == "simulator",
        _share_of_the_plugin,
        scales=False,
    )
    yield Target("unstructured masks, from 1024²", 25, 12, _masks(("tensor",)))
    yield Target("masks of channels, from 1024²", 3, 3, _masks(("channel 0", "channel 1")))
    for op, share in (("topk_mask", 0.4), ("nm_mask", 0.5)):
        name = f"share of the floor: {op}, from 1024²"
        yield Target(name, share, share, _kernel(op), _share_of_floor, scales=False, unit="%")


TARGETS = tuple(_targets())


def _in_place_of_ours(group: Sequence[Result]) -> dict[str, float]:
    """The mean ratio to Apple's that torch's product with one has, where it was measured."""
    ratios = [
        r.seconds["apple"] / r.seconds[MULTIPLY] for r in group if {"apple", MULTIPLY} <= r.seconds.keys()
    ]
    return {"product": geometric_mean(ratios)} if ratios else {}


def evaluate(results: Iterable[Result], isa: str) -> list[dict[str, Any]]:
    """One row a target and number of threads that was measured.

    ``met`` is ``yes``, ``on average`` (the mean is reached, single cases are not) or ``no``.
    """
    results = list(results)
    rows = []
    for target in TARGETS:
        factor = 0.5 if target.scales and isa == "avx2" else 1.0
        for threads in sorted({result.case.threads for result in results}):
            group = [r for r in results if r.case.threads == threads and target.belongs(r)]
            figures = [(target.value(r), r.case.key) for r in group if not math.isnan(target.value(r))]
            if not figures:
                continue
            mean, (least, worst) = geometric_mean(value for value, _ in figures), min(figures)
            mean_met, each_met = mean >= target.mean * factor, least >= target.each * factor
            rows.append(
                {
                    "target": target.name,
                    "threads": threads,
                    "unit": target.unit,
                    "mean_wanted": target.mean * factor,
                    "each_wanted": target.each * factor,
                    "mean": mean,
                    "least": least,
                    "worst_case": worst,
                    "cases": len(figures),
                    "met": "yes" if mean_met and each_met else "on average" if mean_met else "no",
                    **_in_place_of_ours(group),
                }
            )
    return rows
