"""``python -m benchmarks.gpu_check``: all GPU tests and the GPU micro-benchmarks; one JSON file, one table.

Times are device times: medians over replays of a CUDA graph, the L2 cache overwritten before each. Ratios:
``floor`` is the time of ``copy_`` on the same tensor, scaled to the operation's least memory traffic, divided
by the measured time (1 is as fast as memory allows); ``torch`` and ``compile`` say how many times slower
torch's own fused operator and ``torch.compile`` on the reference are.

Exit status: 0 all well, 1 tests failed, 2 no GPU.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SIZES = (256, 512, 1024, 2048, 4096, 8192)
COMPILED_SIZES = (4096,)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Name: format, quant_min, quant_max, power-of-two scale.
FORMATS = {
    "int8": (0, -128.0, 127.0, False),
    "int4": (0, -8.0, 7.0, False),
    "fp8": (1, -448.0, 448.0, False),
    "fp4": (3, -6.0, 6.0, True),
}
GRANULARITIES = ("tensor", "channel", "block32")


def blocks_of(granularity: str, size: int) -> tuple[int, int]:
    return {"tensor": (size, size), "channel": (1, size), "block32": (1, 32)}[granularity]


class Timer:
    """Median device time of a function, in microseconds, with a cold L2 cache."""

    def __init__(self, repeats: int) -> None:
        properties = torch.cuda.get_device_properties(0)
        cache = int(getattr(properties, "L2_cache_size", 64 << 20))
        self._flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device="cuda")
        self._repeats = repeats

    def __call__(self, run: Callable[[], Any]) -> float:
        """Replays a CUDA graph of ``run`` where it can be captured, or else calls it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            replay: Callable[[], Any] = graph.replay
        except RuntimeError:  # it waits for the device, or allocates what a graph may not
            torch.cuda.synchronize()
            replay = run
        times = []
        for _ in range(self._repeats):
            self._flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) * 1000.0 for start, end in times)


def host_time(run: Callable[[], Any], calls: int = 200) -> float:
    """Microseconds of host time a call, with the device left to catch up afterwards."""
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / calls * 1e6


def attempt(timer: Timer, run: Callable[[], Any] | None) -> tuple[float | None, str | None]:
    """Time, or why there is none: torch's operators refuse some dtypes."""
    if run is None:
        return None, None
    try:
        return timer(run), None
    except (RuntimeError, NotImplementedError, TypeError) as error:
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


class Case:
    """One tensor with its parameters; each operation as ours, torch's own and the reference's."""

    def __init__(self, size: int, dtype: torch.dtype, format_name: str, granularity: str) -> None:
        self.format, self.low, self.high, self.power_of_two = FORMATS[format_name]
        self.granularity = granularity
        self.block_size = list(blocks_of(granularity, size))
        self.grid = [size // block for block in self.block_size]
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.x = torch.randn(size, size, device="cuda", generator=generator).to(dtype)
        self.scale = torch.full(self.grid, 0.05, device="cuda")
        self.is_int = self.format == 0
        self.zero_point = torch.zeros(self.grid, dtype=torch.int32, device="cuda") if self.is_int else None
        self.running = (torch.zeros(self.grid, device="cuda", dtype=dtype),) * 2
        self.mask = torch.randint(0, 256, ((size * size + 7) // 8,), dtype=torch.uint8, device="cuda")

    def ours(self, operation: str) -> Callable[[], Any]:
        from coreai_kernels.ops.library import implementation
        from coreai_kernels.ops.observe_and_fake_quantize import packed

        forward = implementation("fake_quantize_forward")
        backward = implementation("fake_quantize_backward")
        step = implementation("observe_and_fake_quantize_")
        running = tuple(value.clone() for value in self.running)
        zero_point = self.zero_point
        if operation == "forward":
            return lambda: forward(self.x, self.scale, zero_point, None, *self._element_config())
        if operation == "backward":
            return lambda: backward(self.x, self.mask, [])
        scale = self.scale.clone()
        *config, with_mask = self._step_config()
        settings = packed(tuple(config))
        return lambda: step(self.x, scale, zero_point, None, *running, True, settings, with_mask)

    def reference(self, operation: str) -> Callable[[], Any]:
        from coreai_kernels.reference import fake_quantize, observe_and_fake_quantize

        if operation == "forward":
            function = torch.compile(fake_quantize.forward, dynamic=False)
            return lambda: function(self.x, self.scale, self.zero_point, None, *self._element_config())
        if operation == "backward":
            function = torch.compile(fake_quantize.backward, dynamic=False)
            return lambda: function(self.x, self.mask, [0, 1])
        function = torch.compile(observe_and_fake_quantize.observe_and_fake_quantize, dynamic=False)
        return lambda: function(self.x, *self.running, *self._step_config())

    def torchs_own(self, operation: str) -> Callable[[], Any] | None:
        """ATen's fused integer operators; the step is the one that observes, too."""
        if not self.is_int or self.granularity == "block32" or self.zero_point is None:
            return None
        low, high = int(self.low), int(self.high)
        scale, zero_point = self.scale.view(-1), self.zero_point.view(-1)
        per_tensor = self.granularity == "tensor"
        if operation == "forward" and per_tensor:
            return lambda: torch.fake_quantize_per_tensor_affine(self.x, scale, zero_point, low, high)
        if operation == "forward":
            return lambda: torch.fake_quantize_per_channel_affine(self.x, scale, zero_point, 0, low, high)
        if operation == "backward":
            mask = torch.rand_like(self.x, dtype=torch.float32) > 0.1
            if per_tensor:
                return lambda: torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward(self.x, mask)
            return lambda: torch.ops.aten.fake_quantize_per_channel_affine_cachemask_backward(self.x, mask)
        on = torch.ones(1, dtype=torch.int64, device="cuda")
        running = [torch.zeros_like(scale) for _ in range(2)]
        state = (*running, scale.clone(), zero_point.clone())
        return lambda: torch.fused_moving_avg_obs_fake_quant(
            self.x, on, on, *state, 0.01, low, high, 0, not per_tensor, True
        )

    def floor_bytes(self, operation: str) -> float:
        """The least traffic (LIMITS): a read and a write, a bit, and a second read for the whole tensor."""
        element = self.x.element_size()
        reads = 2 if operation == "step" and self.granularity == "tensor" else 1
        return self.x.numel() * ((reads + 1) * element + 1 / 8)

    def _element_config(self) -> tuple[Any, ...]:
        return self.block_size, self.format, self.low, self.high, True

    def _step_config(self) -> tuple[Any, ...]:
        moving_average, symmetric = 1, 0
        return (
            self.block_size,
            symmetric,
            self.format,
            self.low,
            self.high,
            False,
            moving_average,
            0.01,
            None,
            None,
            self.power_of_two,
            True,
        )


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    timer = Timer(arguments.repeats)
    sizes = SIZES[1::2] if arguments.quick else SIZES
    for dtype_name, dtype in DTYPES.items():
        for size in sizes:
            x = torch.randn(size, size, device="cuda").to(dtype)
            y = torch.empty_like(x)
            copy = timer(lambda y=y, x=x: y.copy_(x))  # type: ignore[misc]
            for format_name in FORMATS:
                for granularity in GRANULARITIES:
                    for operation in ("forward", "backward", "step"):
                        # The backward pass does not know the format nor the blocks.
                        if operation == "backward" and (format_name, granularity) != ("int8", "tensor"):
                            continue
                        case = Case(size, dtype, format_name, granularity)
                        yield measure_one(timer, case, operation, copy, arguments) | {
                            "operation": operation,
                            "dtype": dtype_name,
                            "size": size,
                            "format": format_name,
                            "granularity": granularity,
                        }


def measure_one(
    timer: Timer, case: Case, operation: str, copy: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    ours = case.ours(operation)
    time_us = timer(ours)
    compiled: Callable[[], Any] | None = None
    if arguments.compile and case.x.size(0) in COMPILED_SIZES:
        torch.compiler.reset()
        compiled = case.reference(operation)
    theirs, theirs_error = attempt(timer, case.torchs_own(operation))
    compiled_us, compiled_error = attempt(timer, compiled)
    moved = case.floor_bytes(operation)
    floor = copy * moved / (2 * case.x.numel() * case.x.element_size())
    return {
        "time_us": time_us,
        "host_us": host_time(ours),
        "copy_us": copy,
        "floor_us": floor,
        "floor_over_time": floor / time_us,
        "gigabytes_per_second": moved / time_us / 1e3,
        "torch_us": theirs,
        "torch_over_time": theirs and theirs / time_us,
        "torch_error": theirs_error,
        "compile_us": compiled_us,
        "compile_over_time": compiled_us and compiled_us / time_us,
        "compile_error": compiled_error,
    }


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
    "torch_over_time": "torch",
    "compile_over_time": "compile",
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


def run_tests() -> dict[str, Any]:
    """``pytest -m gpu`` in a process of its own."""
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
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (result.stdout + result.stderr).splitlines()
    print("\n".join(lines[-60:] if result.returncode else lines[-3:]))
    return {
        "command": " ".join(command[1:]),
        "status": result.returncode,
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
        for name in ("floor_over_time", "torch_over_time", "compile_over_time")
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="result file (%(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="replays a measurement (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="every other size")
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
    result: dict[str, Any] = {"machine": machine()}
    if arguments.tests:
        result["tests"] = run_tests()
    if arguments.benchmarks:
        rows = []
        for row in measure(arguments):
            rows.append(row)
            print(f"\r{len(rows)} measurements", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        result |= {"rows": rows, "large_tensors_geometric_mean": summary(rows)}
        show(rows, f"{result['machine']['gpu']}: floor, torch and compile over our time")
        print("4096 and up, geometric means:", {k: cell(v) for k, v in summary(rows).items()})
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.json}")
    return 1 if arguments.tests and result["tests"]["status"] else 0


if __name__ == "__main__":
    sys.exit(main())
