"""ModelOpt's fake quantizers on a CPU, beside the engine's operator: ``python -m benchmarks.modelopt``.

Forward and backward of a weight whose range is known, in turns; processor time, which others' work on the
machine leaves alone. ``MODELOPT_PATH`` names a folder with ModelOpt and what it imports::

    pip install --no-deps --target FOLDER nvidia-modelopt==0.47.0 requests urllib3 certifi omegaconf pulp
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import coreai_kernels as ck
from benchmarks.facts import save_rows
from benchmarks.timing import settle_allocator
from benchmarks.turns import processor_seconds, steps_in_turns

__all__ = ["CASES", "main", "measure"]

# ModelOpt's settings; the largest integer; the elements of a block, 0 for a side of the matrix.
CASES: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    "int8, tensor": ({"num_bits": 8}, 127, (0, 0)),
    "int8, channels": ({"num_bits": 8, "axis": 0}, 127, (1, 0)),
    "int4, blocks of 32": ({"num_bits": 4, "block_sizes": {-1: 32}}, 7, (1, 32)),
}
_SAMPLE_SECONDS = 0.05


def _theirs(fields: dict[str, Any], x: Tensor) -> Callable[[Tensor], Tensor]:
    """ModelOpt's quantizer, calibrated on ``x``."""
    folder = os.environ.get("MODELOPT_PATH")
    if not folder or not (Path(folder) / "modelopt").is_dir():
        raise SystemExit(f"MODELOPT_PATH must be a folder with the package modelopt; got {folder!r}")
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: what is installed here counts first
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(**fields))
    quantizer.enable_calib()
    quantizer.disable_quant()
    quantizer(x)
    quantizer.load_calib_amax()
    quantizer.disable_calib()
    quantizer.enable_quant()
    return quantizer  # type: ignore[no-any-return]


def _ours(largest: int, block: tuple[int, int], x: Tensor) -> Callable[[Tensor], Tensor]:
    rows, columns = (size or side for size, side in zip(block, x.shape, strict=True))
    parts = x.detach().reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
    scale = parts.abs().amax((1, 3)) / largest
    fields: dict[str, Any] = {"format": ck.Format.INT, "quant_min": -largest, "quant_max": largest}
    return lambda tensor: ck.fake_quantize(tensor, scale=scale, block_size=(rows, columns), **fields)


def measure(sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Medians over ``rounds``, in seconds a step."""
    settle_allocator()
    rows = []
    for name, (fields, largest, block) in CASES.items():
        for size in sizes:
            x, gradient = torch.randn(size, size, requires_grad=True), torch.randn(size, size)
            functions = {"modelopt": _theirs(fields, x.detach()), "native": _ours(largest, block, x)}
            difference = (functions["modelopt"](x) - functions["native"](x)).abs()
            # ModelOpt multiplies by a reciprocal: what lies between two integers may go the other way.
            if float((difference > 1e-5).float().mean()) > 1e-3:
                raise RuntimeError(f"{name}: the contenders compute different things")

            def step(run: Any, x: Tensor = x, gradient: Tensor = gradient) -> None:
                run(x).backward(gradient)
                x.grad = None

            steps = {who: partial(step, run) for who, run in functions.items()}
            calls = {
                who: max(1, int(_SAMPLE_SECONDS / processor_seconds(each, 1))) for who, each in steps.items()
            }
            rows.append({"case": name, "size": size, **steps_in_turns(steps, calls, rounds)})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modelopt", description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.sizes, arguments.rounds)
    table = Table(title="A step of ModelOpt's quantizers, processor time in µs", title_justify="left")
    for heading in ("quantizer", "size", "ModelOpt", "here", "ratio"):
        table.add_column(heading, justify="left" if heading == "quantizer" else "right")
    for row in rows:
        theirs, ours = row["seconds"]["modelopt"], row["seconds"]["native"]
        times = (f"{1e6 * each:,.0f}" for each in (theirs, ours))
        table.add_row(row["case"], f"{row['size']}²", *times, f"{theirs / ours:.2f}×")
    Console(width=100).print(table)
    if arguments.json:
        save_rows(arguments.json, "benchmarks.modelopt", argv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
