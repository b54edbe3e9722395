"""Simulators of torchao's training, eager, compiled and on the engine: ``python -m benchmarks.torchao``.

Forward and backward of one simulator on a square matrix, in turns; processor time, which others' work on the
machine leaves alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.facts import save_rows
from benchmarks.timing import settle_allocator
from benchmarks.turns import processor_seconds, steps_in_turns

__all__ = ["CASES", "main", "measure"]


def _intx(**fields: Any) -> torch.nn.Module:
    from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

    return IntxFakeQuantizer(IntxFakeQuantizeConfig(**fields))  # type: ignore[no-any-return]


def _pt2e(observer: str, **fields: Any) -> torch.nn.Module:
    from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize
    from torchao.quantization.pt2e import observer as observers

    bounds = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127}
    return FusedMovingAvgObsFakeQuantize(getattr(observers, observer), **bounds, **fields)  # type: ignore[no-any-return]


CASES: dict[str, Callable[[], torch.nn.Module]] = {
    "int8, tokens": partial(_intx, dtype=torch.int8, granularity="per_token", is_symmetric=False),
    "int8, channels": partial(_intx, dtype=torch.int8, granularity="per_channel"),
    "int4, groups of 32": partial(_intx, dtype=torch.int4, group_size=32),
    "PT2E, tensor": partial(_pt2e, "MovingAverageMinMaxObserver", qscheme=torch.per_tensor_affine),
    "PT2E, channels": partial(
        _pt2e, "MovingAveragePerChannelMinMaxObserver", qscheme=torch.per_channel_symmetric, ch_axis=0
    ),
}
_COLUMNS = ("torchao", "torchao, compiled", "native")
_SAMPLE_SECONDS = 0.05


def measure(cases: Sequence[str], sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Medians over ``rounds``, in seconds a step."""
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # in case that the plugin is not installed
    import coreai_accelerate

    settle_allocator()
    rows = []
    for name in cases:
        for size in sizes:
            x = torch.randn(size, size, requires_grad=True)
            gradient = torch.randn(size, size)
            eager, engine = CASES[name](), CASES[name]()
            if not coreai_accelerate.torchao(engine).replaced:
                raise RuntimeError(f"{name} does not run on the engine: is COREAI_ACCELERATE=0 set?")
            modules = {"torchao": eager, "native": engine}
            if not name.startswith("PT2E"):  # inductor calls the operator of PT2E's as it is
                torch._dynamo.reset()
                modules["torchao, compiled"] = torch.compile(CASES[name](), fullgraph=True, dynamic=False)

            def step(module: torch.nn.Module, x: torch.Tensor = x, gradient: torch.Tensor = gradient) -> None:
                module(x).backward(gradient)
                x.grad = None

            steps = {whose: partial(step, module) for whose, module in modules.items()}
            calls = max(1, int(_SAMPLE_SECONDS / processor_seconds(steps["torchao"], 1)))
            for each in steps.values():
                each()  # compiles
            found = steps_in_turns(steps, dict.fromkeys(steps, calls), rounds)
            rows.append({"case": name, "size": size, **found})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torchao", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.cases, arguments.sizes, arguments.rounds)
    table = Table(title="A step of torchao's simulators, processor time in µs", title_justify="left")
    for heading in ("simulator", "size", "torchao", "compiled", "on the engine", "ratios"):
        table.add_column(heading, justify="left" if heading == "simulator" else "right")
    for row in rows:
        seconds = row["seconds"]
        contenders = [whose for whose in ("torchao", "torchao, compiled") if whose in seconds]
        figures = [f"{1e6 * seconds[whose]:,.0f}" if whose in seconds else "" for whose in _COLUMNS]
        ratios = [f"{seconds[whose] / seconds['native']:.2f}×" for whose in contenders]
        table.add_row(row["case"], f"{row['size']}²", *figures, ", ".join(ratios))
    Console(width=110).print(table)
    if arguments.json:
        save_rows(arguments.json, "benchmarks.torchao", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
