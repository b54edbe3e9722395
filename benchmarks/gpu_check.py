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
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_timing import Timer, figures
from coreai_kernels import Format, QuantConfig, RangeUpdate, ScaleFormat, Scheme

ROOT = Path(__file__).resolve().parents[1]
SIZES = (256, 512, 1024, 2048, 4096, 8192)
COMPILED_SIZES = (4096,)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL = ("tensor", "channel", "block32")
# Name: format, quant_min, quant_max, scale format, granularities.
FORMATS = {
    "int8": (Format.INT, -128.0, 127.0, ScaleFormat.FLOAT32, ALL),
    "int4": (Format.INT, -8.0, 7.0, ScaleFormat.FLOAT32, ALL),
    "fp8": (Format.E4M3, -448.0, 448.0, ScaleFormat.FLOAT32, ALL),
    "fp4": (Format.E2M1, -6.0, 6.0, ScaleFormat.E8M0, ALL),
    "mxint8": (Format.INT, -128.0, 127.0, ScaleFormat.E8M0, ("block32",)),
    "nvfp4": (Format.E2M1, -6.0, 6.0, ScaleFormat.E4M3, ("block16",)),
}


def blocks_of(granularity: str, size: int) -> tuple[int, int]:
    return {"tensor": (size, size), "channel": (1, size), "block32": (1, 32), "block16": (1, 16)}[granularity]


class Case:
    """One tensor with its parameters; each operation as ours, torch's own and the reference's."""

    def __init__(self, size: int, dtype: torch.dtype, format_name: str, granularity: str) -> None:
        self.format, self.low, self.high, self.scale_format, _ = FORMATS[format_name]
        self.granularity = granularity
        self.block_size = list(blocks_of(granularity, size))
        self.grid = [size // block for block in self.block_size]
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.x = torch.randn(size, size, device="cuda", generator=generator).to(dtype)
        self.scale = torch.full(self.grid, 0.05, device="cuda")
        self.is_int = self.format == Format.INT
        self.zero_point = torch.zeros(self.grid, dtype=torch.int32, device="cuda") if self.is_int else None
        self.running = (torch.zeros(self.grid, device="cuda", dtype=dtype),) * 2
        self.mask = torch.randint(0, 256, ((size * size + 7) // 8,), dtype=torch.uint8, device="cuda")

    def ours(self, operation: str) -> Callable[[], Any]:
        from coreai_kernels.ops.library import implementation

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
        config = self._config().packed()
        return lambda: step(self.x, scale, zero_point, None, *running, True, config, True)

    def reference(self, operation: str) -> Callable[[], Any]:
        from coreai_kernels.reference import fake_quantize, observe_and_fake_quantize

        if operation == "forward":
            function = torch.compile(fake_quantize.forward, dynamic=False)
            return lambda: function(self.x, self.scale, self.zero_point, None, *self._element_config())
        if operation == "backward":
            function = torch.compile(fake_quantize.backward, dynamic=False)
            return lambda: function(self.x, self.mask, [0, 1])
        function = torch.compile(observe_and_fake_quantize.observe_and_fake_quantize, dynamic=False)
        config = self._config()
        return lambda: function(self.x, *self.running, config, True)

    def torchs_own(self, operation: str) -> Callable[[], Any] | None:
        """ATen's fused integer operators; the step is the one that observes, too."""
        if not self.is_int or self.granularity.startswith("block") or self.zero_point is None:
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
        # The scales of NVFP4 follow from one of the tensor, too.
        sees_all = self.granularity == "tensor" or self.scale_format == ScaleFormat.E4M3
        reads = 2 if operation == "step" and sees_all else 1
        return self.x.numel() * ((reads + 1) * element + 1 / 8)

    def _element_config(self) -> tuple[Any, ...]:
        return self.block_size, self.format, self.low, self.high, True

    def _config(self) -> Any:
        return QuantConfig(
            block_size=tuple(self.block_size),
            scheme=Scheme.SYMMETRIC,
            format=self.format,
            quant_min=self.low,
            quant_max=self.high,
            update=RangeUpdate.MOVING_AVERAGE,
            scale_format=self.scale_format,
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
                for granularity in FORMATS[format_name][-1]:
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


def measure_operators(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same for masks and palettes."""
    from benchmarks.gpu_operators import operator_benches
    from benchmarks.harness import NATIVE

    timer = Timer(arguments.repeats)
    for case, bench in operator_benches(SIZES[2::2] if arguments.quick else SIZES[2:], "cuda"):
        x = torch.randn(case.size, case.size, device="cuda").to(DTYPES[case.dtype])
        y = torch.empty_like(x)
        copy = timer(lambda y=y, x=x: y.copy_(x))  # type: ignore[misc]
        ours: Any = bench.contenders[NATIVE]
        compiled: Callable[[], Any] | None = None
        if arguments.compile and case.size in COMPILED_SIZES and bench.compilable is not None:
            torch.compiler.reset()
            compiled = bench.compilable(lambda function: torch.compile(function, dynamic=False))  # type: ignore[assignment]
        yield figures(timer, ours, bench.floor_bytes, 2 * x.nbytes, copy, None, compiled) | {
            "operation": " ".join(filter(None, (case.op, case.variant))),
            "dtype": case.dtype,
            "size": case.size,
            "format": case.format,
            "granularity": case.granularity,
        }


def measure_one(
    timer: Timer, case: Case, operation: str, copy: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    ours = case.ours(operation)
    compiled: Callable[[], Any] | None = None
    if arguments.compile and case.x.size(0) in COMPILED_SIZES:
        torch.compiler.reset()
        compiled = case.reference(operation)
    theirs = case.torchs_own(operation)
    return figures(timer, ours, case.floor_bytes(operation), 2 * case.x.nbytes, copy, theirs, compiled)


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
        for row in chain(measure(arguments), measure_operators(arguments)):
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
