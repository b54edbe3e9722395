"""Training steps of whole models, quantized against float: ``python -m benchmarks.training``."""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks.apple import Apple
from benchmarks.facts import machine_facts
from benchmarks.models.training_report import APPLE, OURS, PLUGIN, Result, TrainingReport, print_report
from benchmarks.models.training_step import (
    COMPILED,
    CONFIGS,
    EAGER,
    FLOAT,
    GRAPH,
    INT4,
    TrainingStep,
)
from benchmarks.models.zoo import MANY, MODELS, ONE
from benchmarks.timing import settle_allocator

__all__ = ["Options", "main", "run"]

# The models of the comparison; the others are there for the sake of the tests.
_MODELS = tuple(name for name in MODELS if name not in ("convolutions", "shared"))
_WIDTH_OF_A_FILE = 200
# A package, a config, a mode.
_Contender = tuple[str, str, str]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        models: names out of `benchmarks.models.zoo`.
        configs: names out of `benchmarks.models.training_step.CONFIGS`.
        modes: of execution, out of `benchmarks.models.training_step.MODES`.
        threads: numbers of threads, one after the other.
        rounds: turns that the contenders take.
        sample_seconds: least time of a turn.
        cpu_time: count what the process uses of the processors instead of the time that passes.
        apple: folder with Apple's package, which runs by itself and with the plugin; or None.
        command: what the user typed.
    """

    models: tuple[str, ...]
    configs: tuple[str, ...]
    modes: tuple[str, ...] = (EAGER, GRAPH)
    threads: tuple[int, ...] = (1,)
    rounds: int = 9
    sample_seconds: float = 0.1
    cpu_time: bool = False
    apple: Path | None = None
    command: str = ""


def run(options: Options) -> TrainingReport:
    """Measure: for each model, all contenders take turns, the float step of either process among them."""
    start = time.perf_counter()
    threads_before = torch.get_num_threads()
    settle_allocator()
    workers: dict[str, Apple] = {}
    results = []
    try:
        if options.apple is not None:
            workers[APPLE] = Apple(options.apple)
            workers[PLUGIN] = Apple(options.apple, accelerated=True)
        cases = [(model, threads) for threads in options.threads for model in options.models]
        with tqdm(cases, unit="model", disable=None) as progress:
            for model, threads in progress:
                progress.set_description(f"{model}, {threads} thread(s)")
                torch.set_num_threads(threads)
                results += _measure(model, threads, options, workers)
    finally:
        torch.set_num_threads(threads_before)
        for worker in workers.values():
            worker.close()
    machine = machine_facts() | {"clock": "processors" if options.cpu_time else "elapsed"}
    return TrainingReport(machine, options.command, time.perf_counter() - start, results)


def _measure(model: str, threads: int, options: Options, workers: dict[str, Apple]) -> list[Result]:
    # Of the layers that are compared by their number, the weights matter, in one mode.
    one_mode = model in (MANY, ONE)
    configs = [config for config in options.configs if config == INT4 or not one_mode]
    modes = [mode for mode in options.modes if mode == EAGER or not one_mode]
    wanted = [(config, mode) for mode in modes for config in configs]
    if not wanted:
        return []
    cases = [(FLOAT, EAGER), *wanted]
    steps = {case: TrainingStep(model, *case) for case in cases}
    digests = {case: step.digest() for case, step in steps.items()}
    samplers: dict[_Contender, Callable[[int], float]] = {
        (OURS, *case): lambda calls, step=step: step.seconds(calls, options.cpu_time)  # type: ignore[misc]
        for case, step in steps.items()
    }
    same = dict.fromkeys(cases, True)
    for package, worker in workers.items():
        for case in cases:
            prepared = worker.prepare_training(model, *case, threads)
            same[case] &= prepared["digest"] == digests[case]
            samplers[package, *case] = lambda calls, worker=worker, case=case: worker.sample_training(  # type: ignore[misc]
                *case, calls, options.cpu_time
            )
    calls = {who: _calls(sampler, options.sample_seconds) for who, sampler in samplers.items()}
    times: dict[_Contender, list[float]] = {who: [] for who in samplers}
    for _ in range(options.rounds):
        for who, sampler in samplers.items():
            times[who].append(sampler(calls[who]))
    for worker in workers.values():
        worker.release()
    plain = {package: times[package, FLOAT, EAGER] for package, *_ in samplers}
    return [
        Result(
            model=model,
            config=config,
            mode=mode,
            threads=threads,
            simulators=steps[config, mode].simulators,
            float_seconds={package: statistics.median(plain[package]) for package in plain},
            seconds={package: statistics.median(times[package, config, mode]) for package in plain},
            overhead={package: _overhead(times[package, config, mode], plain[package]) for package in plain},
            # The compiler may sum in another order.
            same_losses=same[config, mode] if workers and mode != COMPILED else None,
        )
        for config, mode in wanted
    ]


def _calls(sampler: Callable[[int], float], seconds: float) -> int:
    sampler(1)
    return max(1, math.ceil(seconds / sampler(1)))


def _overhead(quantized: Sequence[float], plain: Sequence[float]) -> float:
    """Median of the differences within a round: what slows a whole round cancels."""
    return statistics.median(one - other for one, other in zip(quantized, plain, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=(*MODELS, MANY, ONE), default=(*_MODELS, MANY, ONE), metavar="NAME")
    add("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    add("--modes", nargs="+", choices=(EAGER, GRAPH), default=(EAGER, GRAPH))
    add("--compiled", action="store_true", help="graphs through torch.compile, too: a minute each")
    add("--threads", nargs="+", type=int, default=(1, 2))
    add("--rounds", type=int, default=9)
    add("--apple", type=Path, metavar="PATH", help="folder with Apple's package (default: .oracle if there)")
    add("--without-apple", action="store_true")
    add("--cpu-time", action="store_true", help="on a busy machine: time of the processors, not of the clock")
    add("--quick", action="store_true", help="three short rounds on one thread")
    add("--json", type=Path, metavar="OUT", help="write all figures")
    add("--plot", type=Path, metavar="OUT.png", help="draw them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    apple = arguments.apple or (Path(".oracle") if Path(".oracle").is_dir() else None)
    options = Options(
        models=tuple(arguments.models),
        configs=tuple(arguments.configs),
        modes=(*arguments.modes, *[COMPILED] * arguments.compiled),
        threads=(1,) if arguments.quick else tuple(arguments.threads),
        rounds=3 if arguments.quick else arguments.rounds,
        sample_seconds=0.02 if arguments.quick else 0.1,
        cpu_time=arguments.cpu_time,
        apple=None if arguments.without_apple else apple,
        command=shlex.join(["python", "-m", "benchmarks.training", *argv]),
    )
    report = run(options)
    console = Console()
    print_report(report, console if console.is_terminal else Console(width=_WIDTH_OF_A_FILE))
    if arguments.json:
        report.save(arguments.json)
    if arguments.plot:
        from benchmarks.models.training_plot import save_plot

        save_plot(report, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
