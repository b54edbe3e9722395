"""Runs the cases that were asked for."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import memory, pruning_suite, simulator
from benchmarks.apple import Apple
from benchmarks.cases import Case, Sweep
from benchmarks.facts import machine_facts
from benchmarks.harness import Effort, Operation, Result, add_compiled, keep_freed_memory, measure
from benchmarks.ops import (
    apply_mask,
    bits,
    block_mask,
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_backward,
    fake_quantize_backward_,
    gptq_columns,
    kmeans_1d,
    learnable_range,
    lookup,
    nm_mask,
    observe_and_fake_quantize,
    observe_range,
    palettize,
    quantize,
    sampled_mask,
    soft_palettize,
    topk_mask,
)
from benchmarks.pruning import PRUNING
from benchmarks.report import Report
from benchmarks.simulation import TRAINING, Simulation
from benchmarks.targets import evaluate
from benchmarks.timing import settle_allocator

__all__ = ["OPERATIONS", "Options", "available_threads", "run"]

SIMULATOR, MEMORY = "simulator", "memory"
_KERNELS: dict[str, Operation] = {
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "fake_quantize_backward_": fake_quantize_backward_,
    "observe_range": observe_range,
    "observe_and_fake_quantize": observe_and_fake_quantize,
    "choose_qparams": choose_qparams,
    "quantize": quantize,
    "dequantize": dequantize,
    "bits": bits,
    "apply_mask": apply_mask,
    "block_mask": block_mask,
    "gptq_columns": gptq_columns,
    "kmeans_1d": kmeans_1d,
    "learnable_range": learnable_range,
    "lookup": lookup,
    "nm_mask": nm_mask,
    "palettize": palettize,
    "sampled_mask": sampled_mask,
    "soft_palettize": soft_palettize,
    "topk_mask": topk_mask,
}
OPERATIONS = (SIMULATOR, PRUNING, *_KERNELS, MEMORY)

# Compilation takes seconds a case: these stand for the others unless all are asked for.
_COMPILED_SAMPLE = {
    ("simulator", "int4", "block 32", 1024, "fp32", TRAINING, "static"),
    ("fake_quantize", "int8", "channel 0", 1024, "fp32", "", ""),
    ("observe_and_fake_quantize", "int4", "block 32", 1024, "fp32", "", "moving_average"),
}


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        operations: names out of :data:`OPERATIONS`.
        sweep: sizes, dtypes and threads.
        effort: how long to measure.
        apple: folder with Apple's package, or None.
        compile: ``none`` of the cases, a ``sample`` of them, or ``all``.
        command: what the user typed.
    """

    operations: tuple[str, ...]
    sweep: Sweep
    effort: Effort
    apple: Path | None
    compile: str
    command: str


def run(options: Options) -> Report:
    """Measure. Simulators come first, with the allocator as it is; then the kernels, on warm memory."""
    start = time.perf_counter()
    machine = machine_facts() | {
        "threads": list(options.sweep.threads),
        "statistic": "fastest" if options.effort.fastest else "median",
    }
    threads_before = torch.get_num_threads()
    settle_allocator()
    results: list[Result] = []
    footprints: list[dict[str, Any]] = []
    apple = plugin = None
    try:
        if options.apple is not None:
            apple = Apple(options.apple)
            plugin = Apple(options.apple, accelerated=True) if SIMULATOR in options.operations else None
        if SIMULATOR in options.operations:
            results += _run_operations({SIMULATOR: simulator.Suite(apple, plugin)}, options, warm=False)
        if PRUNING in options.operations:
            results += _run_operations({PRUNING: pruning_suite.Suite(apple)}, options, warm=False)
        if MEMORY in options.operations:
            footprints = [_footprint(case, apple) for case in memory.CASES]
    finally:
        for worker in (apple, plugin):
            if worker is not None:
                worker.close()
    kernels = {name: operation for name, operation in _KERNELS.items() if name in options.operations}
    if kernels:
        results += _run_operations(kernels, options, warm=keep_freed_memory())
    torch.set_num_threads(threads_before)
    targets = evaluate(results, machine["isa"])
    return Report(machine, options.command, time.perf_counter() - start, results, targets, footprints)


def _run_operations(operations: dict[str, Any], options: Options, *, warm: bool) -> list[Result]:
    cases = [case for operation in operations.values() for case in operation.cases(options.sweep)]
    results = {}
    # Equal inputs one after the other: they are made once.
    in_order = sorted(cases, key=lambda case: (case.size, case.dtype))
    with tqdm(in_order, unit="case", disable=None, mininterval=0.5) as progress:
        for case in progress:
            name = f"{case.op} {case.format} {case.granularity} {case.size}²"
            progress.set_description(name, refresh=False)
            torch.set_num_threads(case.threads)
            bench = operations[case.op].build(case)
            if _is_compiled(case, options.compile):
                add_compiled(bench)
            results[case] = measure(case, bench, options.effort, warm=warm)
            bench.release()
    return [results[case] for case in cases]


def _is_compiled(case: Case, which: str) -> bool:
    if which == "sample":
        facts = (case.op, case.format, case.granularity, case.size, case.dtype, case.phase, case.variant)
        return facts in _COMPILED_SAMPLE
    return which == "all"


def _footprint(case: Case, apple: Apple | None) -> dict[str, Any]:
    name = f"{case.format}, {case.granularity}, {case.variant}, {case.dtype} {case.size}²"
    row: dict[str, Any] = {"name": name, "ours": memory.of_simulation(Simulation(case))}
    if apple is not None:
        row["apple"] = apple.memory(case)
    return row


def available_threads() -> tuple[int, ...]:
    """One and two, as far as there are cores."""
    return tuple(count for count in (1, 2) if count <= (os.cpu_count() or 1))
