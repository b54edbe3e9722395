"""Times the contenders of a case in turns, beside a plain copy that gives the machine's bandwidth."""

import ctypes
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.cases import Case, make_input
from benchmarks.timing import UNTIMED_CALL_BELOW, seconds_per_call

__all__ = [
    "COPY",
    "MULTIPLY",
    "NATIVE",
    "Bench",
    "Contender",
    "Effort",
    "Local",
    "Operation",
    "Result",
    "Sampler",
    "add_compiled",
    "add_if_supported",
    "keep_freed_memory",
    "measure",
    "spread_of",
]

COPY, NATIVE, MULTIPLY = "copy", "native", "x * 1"
_FRESH_FROM_BYTES = 32 * 2**20


class Sampler(Protocol):
    """Something that can be timed, here or in another process."""

    def sample(self, calls: int, *, untimed_call: bool) -> float:
        """Mean time of one of ``calls`` calls."""


@dataclass(frozen=True)
class Local:
    """A function of this process; ``context`` surrounds each sample, outside the clock."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def sample(self, calls: int, *, untimed_call: bool) -> float:
        with self.context():
            return seconds_per_call(self.call, calls, untimed_call=untimed_call)


Contender = Sampler | Callable[[], object]


@dataclass
class Bench:
    """A case made ready: contenders by name, and the least bytes that one call must move.

    Attributes:
        contenders: functions, or what else can be timed.
        floor_bytes: the least traffic.
        output_bytes: size of the largest tensor that a call allocates.
        compilable: makes the contender ``compile``, given the function that compiles another.
        notes: what is missing, and why.
        release: to be called after the measurement.
    """

    contenders: dict[str, Contender]
    floor_bytes: float
    output_bytes: int = 0
    compilable: Callable[[Callable[..., Any]], Contender] | None = None
    notes: list[str] = field(default_factory=list)
    release: Callable[[], None] = lambda: None


class Operation(Protocol):
    """What a module of an operation offers."""

    def cases(self, sweep: Any) -> Iterable[Case]:
        """The cases of a run."""

    def build(self, case: Case) -> Bench:
        """Inputs and contenders of a case."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: at most ``rounds`` turns of at least ``sample_seconds`` each.

    A turn is many calls of all but the slowest contenders: the first ones pay for what another has left in
    the caches and in the allocator. The turns' median counts; with ``fastest``, which suits a busy machine,
    the fastest one.
    """

    rounds: int = 5
    sample_seconds: float = 20e-3
    fastest: bool = False

    def rounds_for(self, call_seconds: float) -> int:
        """Slow calls vary less, and cost more."""
        if call_seconds < UNTIMED_CALL_BELOW:
            return self.rounds
        return min(self.rounds, 3 if call_seconds < 2 * UNTIMED_CALL_BELOW else 2)


@dataclass
class Result:
    """Seconds a call of each contender, the samples' interquartile range over their median, and the floor."""

    case: Case
    seconds: dict[str, float]
    spread: dict[str, float]
    floor_bytes: float
    memory: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def floor_seconds(self) -> float:
        """Time of the least traffic at the copy's bandwidth."""
        return self.seconds[COPY] * self.floor_bytes / (2 * self.case.numel * self.case.element_bytes)

    @property
    def share_of_floor(self) -> float:
        """1 where nothing faster is possible; NaN without a native time."""
        return self.floor_seconds / self.seconds[NATIVE] if NATIVE in self.seconds else math.nan

    @property
    def gigabytes_per_second(self) -> float:
        """The least traffic over the native time."""
        return self.floor_bytes / self.seconds[NATIVE] / 1e9 if NATIVE in self.seconds else math.nan

    def ratio(self, contender: str) -> float:
        """How many times longer than the native one it takes; NaN if either was not measured."""
        if contender not in self.seconds or NATIVE not in self.seconds:
            return math.nan
        return self.seconds[contender] / self.seconds[NATIVE]

    def as_json(self) -> dict[str, Any]:
        return {
            "key": self.case.key,
            "case": asdict(self.case),
            "seconds": self.seconds,
            "spread": self.spread,
            "floor_bytes": self.floor_bytes,
            "floor_seconds": self.floor_seconds,
            "memory": self.memory,
            "notes": self.notes,
            "ratios": {name: self.ratio(name) for name in self.seconds if NATIVE in self.seconds},
            "share_of_floor": None if math.isnan(self.share_of_floor) else self.share_of_floor,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Result":
        fields = ("seconds", "spread", "floor_bytes", "memory", "notes")
        return cls(Case(**data["case"]), **{name: data[name] for name in fields})


def add_if_supported(bench: Bench, name: str, call: Callable[[], object]) -> None:
    """Add a contender that may not support the case: then a note tells so."""
    try:
        call()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        bench.notes.append(f"{name}: {str(error).splitlines()[0]}")
    else:
        bench.contenders[name] = call


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory, so that outputs come from pages that were touched before.

    Returns whether that is possible here (glibc). Lasts until the process ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    trim_threshold, most_mapped_chunks = -1, -4
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(most_mapped_chunks, 0))


def measure(case: Case, bench: Bench, effort: Effort, *, warm: bool) -> Result:
    """Time all contenders of a case, one after the other, several times round.

    Args:
        case: what it is.
        bench: the contenders; a copy of a matrix of the case's size and dtype, both touched, joins them.
        effort: how long.
        warm: whether freed memory is kept, see :func:`keep_freed_memory`.
    """
    source = make_input(case)
    destination = torch.zeros_like(source)
    contenders: dict[str, Contender] = {COPY: lambda: destination.copy_(source), **bench.contenders}
    samplers: dict[str, Sampler] = {
        name: contender if hasattr(contender, "sample") else Local(contender)  # type: ignore[arg-type]
        for name, contender in contenders.items()
    }
    times: dict[str, list[float]] = {name: [] for name in samplers}
    calls: dict[str, int] = {}
    rounds: dict[str, int] = {}
    is_quick: dict[str, bool] = {}
    for name, sampler in samplers.items():
        estimate = sampler.sample(1, untimed_call=False)
        if estimate < UNTIMED_CALL_BELOW:
            estimate = sampler.sample(3, untimed_call=True)
        calls[name] = max(1, math.ceil(effort.sample_seconds / estimate))
        rounds[name] = effort.rounds_for(estimate)
        is_quick[name] = estimate < UNTIMED_CALL_BELOW
    for _ in range(effort.rounds):
        for name, sampler in samplers.items():
            if len(times[name]) < rounds[name]:
                times[name].append(sampler.sample(calls[name], untimed_call=is_quick[name]))
    statistic = min if effort.fastest else statistics.median
    return Result(
        case,
        {name: statistic(values) for name, values in times.items()},
        {name: spread_of(values) for name, values in times.items()},
        bench.floor_bytes,
        _memory(bench.output_bytes, warm),
        bench.notes,
    )


def add_compiled(bench: Bench) -> None:
    """Add ``torch.compile`` of the reference; the time of compilation goes into the notes."""
    if bench.compilable is None:
        return
    torch._dynamo.reset()
    contender = bench.compilable(lambda function: torch.compile(function, fullgraph=True, dynamic=False))
    sampler = contender if hasattr(contender, "sample") else Local(contender)  # type: ignore[arg-type]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler.sample(1, untimed_call=True)  # type: ignore[union-attr]
    bench.notes.append(f"compile: took {time.perf_counter() - start:.1f} s to compile")
    bench.contenders["compile"] = sampler  # type: ignore[assignment]


def spread_of(values: Sequence[float]) -> float:
    """The distance between the quartiles, as a share of the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def _memory(output_bytes: int, warm: bool) -> str:
    if warm:
        return "warm"
    return "fresh" if output_bytes >= _FRESH_FROM_BYTES else "allocator"
