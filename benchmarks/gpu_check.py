"""``python -m benchmarks.gpu_check``: all GPU tests and the GPU micro-benchmarks; one JSON file, one table.

Times are device times: medians over replays of a CUDA graph, the L2 cache overwritten before each. Ratios:
``floor`` is the time of ``copy_`` on the same tensor, scaled to the operation's least memory traffic, divided
by the measured time (1 is as fast as memory allows); ``torch``, ``compile``, ``torchao`` and ``modelopt`` say
how many times slower torch's own fused operator, ``torch.compile`` on the reference, torchao's primitives and
ModelOpt's fake quantizers (where installed) are. ``predicted`` is what ``benchmarks.gpu_model`` expects. A
training loop runs as a CUDA graph and without. What does not fit into ``--minutes`` is left out, small cases
first; the tests get 0.6 of it.

Exit status: 0 all well, 1 tests failed, 2 no GPU.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import DTYPES, cases, is_compiled
from benchmarks.gpu_peers import modelopts, torchaos
from benchmarks.gpu_predictions import Predictions, compilers_in_use
from benchmarks.gpu_timing import Timer, figures
from benchmarks.gpu_training import training_loop

ROOT = Path(__file__).resolve().parents[1]
# The most telling sizes first, in case that time runs out.
SIZES = (4096, 1024, 256, 8192, 2048, 512)
CONTENDERS = ("torch", "compile", "torchao", "modelopt")
PREDICTIONS = ROOT / "benchmarks/results/gpu-model.json"
# Of the time that there is, what the tests may take.
TESTS_SHARE = 0.6
OUT_OF_TIME = 124


def measure(
    timer: Timer, size: int, predictions: Predictions, compiles: bool, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Quantization of matrices of one size."""
    for dtype_name, dtype in DTYPES.items():
        copy = copy_time(timer, size, dtype, device)
        for case, operation in cases(size, dtype, device):
            compiled: Callable[[], Any] | None = None
            if compiles and is_compiled(case):
                torch.compiler.reset()
                compiled = case.reference(operation)
            contenders = {
                "torch": case.torchs_own(operation),
                "compile": compiled,
                "torchao": torchaos(case, operation),
                "modelopt": modelopts(case, operation),
            }
            moved = case.floor_bytes(operation)
            yield {
                "operation": operation,
                "dtype": dtype_name,
                "size": size,
                "format": case.format_name,
                "granularity": case.granularity,
                "predicted_us": predictions.microseconds(case, operation, dtype_name, copy),
                **figures(timer, case.ours(operation), moved, 2 * case.x.nbytes, copy, contenders),
            }


def measure_operators(
    timer: Timer, size: int, predictions: Predictions, compiles: bool, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """The same for masks and palettes."""
    from benchmarks.gpu_operators import operator_benches
    from benchmarks.harness import NATIVE

    for case, bench in operator_benches([size], device):
        dtype = DTYPES[case.dtype]
        ours: Any = bench.contenders[NATIVE]
        compiled: Callable[[], Any] | None = None
        if compiles and size == SIZES[0] and case.dtype == "bf16" and bench.compilable is not None:
            torch.compiler.reset()
            compiled = bench.compilable(lambda function: torch.compile(function, dynamic=False))  # type: ignore[assignment]
        copied = 2 * size**2 * dtype.itemsize
        copy = copy_time(timer, size, dtype, device)
        contenders = dict.fromkeys(CONTENDERS) | {"compile": compiled}
        yield {
            "operation": " ".join(filter(None, (case.op, case.variant))),
            "dtype": case.dtype,
            "size": case.size,
            "format": case.format,
            "granularity": case.granularity,
            "predicted_us": predictions.of_operator(case, copy),
            **figures(timer, ours, bench.floor_bytes, copied, copy, contenders),
        }


def copy_time(timer: Timer, size: int, dtype: torch.dtype, device: str) -> float:
    """Microseconds of a copy of a matrix."""
    x = torch.randn(size, size, device=device).to(dtype)
    y = torch.empty_like(x)
    return timer(lambda: y.copy_(x))


def measurements(arguments: argparse.Namespace, gpu: str) -> Iterator[dict[str, Any]]:
    """All of them, in the order of :data:`SIZES`."""
    timer = Timer(arguments.repeats)
    predictions = Predictions.read(arguments.predictions, gpu, compilers_in_use())
    for size in SIZES[:3] if arguments.quick else SIZES:
        yield from measure(timer, size, predictions, arguments.compile)
        if size >= 1024:
            yield from measure_operators(timer, size, predictions, arguments.compile)


def until(deadline: float, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows that are there before ``time.monotonic()`` says so."""
    for row in rows:
        yield row
        if time.monotonic() > deadline:
            print("\nthe time is up: smaller cases are left out (--minutes)", file=sys.stderr)
            return


COLUMNS = {
    "operation": "operation",
    "dtype": "dtype",
    "size": "size",
    "format": "format",
    "granularity": "granularity",
    "time_us": "µs",
    "host_us": "host µs",
    "gigabytes_per_second": "GB/s",
    "floor_over_time": "floor",
    "predicted_us": "predicted µs",
    **{f"{name}_over_time": name for name in CONTENDERS},
}


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.2f}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def show(rows: list[dict[str, Any]], title: str) -> None:
    """One table, with rich where it is installed."""
    lines = [[cell(row[name]) for name in COLUMNS] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(COLUMNS.values(), *lines, strict=True)]
        print(title)
        for line in [list(COLUMNS.values()), *lines]:
            print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
        return
    table = Table(title=title)
    for i, name in enumerate(COLUMNS.values()):
        table.add_column(name, justify="left" if i < 5 else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def run_tests(seconds: float) -> dict[str, Any]:
    """``pytest -m gpu`` in processes of its own, for so long at most."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "tests",
    ]
    if importlib.util.find_spec("xdist") is not None:
        # Most of their time is Triton's compiler, on the host.
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = OUT_OF_TIME
        output.seek(0)
        lines = output.read().splitlines()
    print("\n".join(lines[-60:] if status else lines[-3:]))
    if status == OUT_OF_TIME:
        print(f"the GPU tests did not end within {seconds:.0f} s (--minutes)")
    return {
        "command": " ".join(command[1:]),
        "status": status,
        "seconds": time.monotonic() - started,
        "tail": lines[-200:],
    }


def machine() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    large = [row for row in rows if row["size"] >= 4096]
    return {
        name: geometric_mean([row[name] for row in large if row[name]])
        for name in ("floor_over_time", *(f"{name}_over_time" for name in CONTENDERS))
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="result file (%(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="replays a measurement (%(default)s)")
    parser.add_argument("--minutes", type=float, default=6.5, help="for all of it (%(default)s)")
    parser.add_argument(
        "--predictions", type=Path, default=PREDICTIONS, help="of benchmarks.gpu_model --json"
    )
    parser.add_argument("--quick", action="store_true", help="three sizes")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="benchmarks only")
    parser.add_argument("--no-benchmarks", dest="benchmarks", action="store_false", help="tests only")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print(
            f"gpu_check needs a CUDA GPU, and torch {torch.__version__} finds none "
            f"({'built for CUDA ' + torch.version.cuda if torch.version.cuda else 'built without CUDA'}).",
            file=sys.stderr,
        )
        return 2
    deadline = time.monotonic() + 60 * arguments.minutes
    result: dict[str, Any] = {"machine": machine()}
    gpu = result["machine"]["gpu"]
    if arguments.tests:
        result["tests"] = run_tests(60 * arguments.minutes * TESTS_SHARE)
    if arguments.benchmarks:
        result["training"] = training_loop()
        print(
            "A training step, milliseconds:",
            {k: cell(v) for k, v in result["training"]["milliseconds"].items()},
        )
        print("Losses of the CUDA graph differ by", result["training"]["losses_differ_by"])
        rows = []
        for row in until(deadline, measurements(arguments, gpu)):
            rows.append(row)
            print(f"\r{len(rows)} measurements", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        result |= {"rows": rows, "large_tensors_geometric_mean": summary(rows)}
        show(rows, f"{gpu}: floor, and others over our time")
        print("4096 and up, geometric means:", {k: cell(v) for k, v in summary(rows).items()})
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.json}")
    return 1 if arguments.tests and result["tests"]["status"] else 0


if __name__ == "__main__":
    sys.exit(main())
