"""Memory and step time over many steps of the demo's training: ``python -m benchmarks.soak``.

The network, data and compressions of ``examples/digits_qat.py``: pruned and quantized in eager mode, a
quantized graph, palettes. What is seen is printed as it goes. Memory counts from the end of the first window
on. Exit status 1 if one of them grows by more than ``--most`` MiB.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.facts import save_rows

__all__ = ["KINDS", "main", "soak"]

EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS = ("pruned, quantized", "graph", "palettes")
_MIB = 2**20


@dataclass(frozen=True)
class Window:
    """What is seen at the end of some steps.

    Attributes:
        steps: all of them so far.
        rss: resident memory of the process, bytes.
        allocated: bytes that malloc has given out and not got back, mapped ones among them.
        objects: that Python's garbage collector knows, after it has run.
        seconds: of the processor, of the median step of the window.
    """

    steps: int
    rss: int
    allocated: int
    objects: int
    seconds: float


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _allocated() -> int:
    """Of glibc 2.33 or later."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _prepared(kind: str, images: torch.Tensor, steps: int) -> tuple[nn.Module, Any, Callable[[], None]]:
    """A compressed network, the context to train it in, and what follows a step."""
    from digits_model import DigitsNet
    from pruned_model import PATTERNS, pruning_config
    from quantized_model import configuration

    from coreai_opt.palettization import KMeansPalettizer
    from coreai_opt.pruning import MagnitudePruner
    from coreai_opt.quantization import Quantizer

    model: nn.Module = DigitsNet()
    if kind == "palettes":
        palettizer = KMeansPalettizer(model)
        return palettizer.prepare((images,)), palettizer.training_mode, palettizer.step
    if kind == "graph":
        quantizer = Quantizer(model, configuration("graph"))
        return quantizer.prepare((images,)), quantizer.training_mode, quantizer.step
    pruner = MagnitudePruner(model, pruning_config(PATTERNS["sparse75"], steps))
    pruner.prepare((images,))
    quantizer = Quantizer(model, configuration("eager"))
    return quantizer.prepare((images,)), quantizer.training_mode, pruner.step


def soak(kind: str, steps: int, windows: int, batch: int) -> Iterator[Window]:
    """Train for so many steps, and look at the process so many times on the way."""
    sys.path[:0] = [str(EXAMPLES)]
    from digits_model import load_data
    from training import training_step

    torch.manual_seed(0)
    data = load_data(0)
    model, mode, after = _prepared(kind, data.train_images[:batch], steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    shuffling, times = torch.Generator().manual_seed(0), []
    entered: AbstractContextManager[Any] = mode()
    with entered:
        for step in range(1, steps + 1):
            chosen = torch.randint(len(data.train_labels), (batch,), generator=shuffling)
            start = time.process_time()
            training_step(model, optimizer, data.train_images[chosen], data.train_labels[chosen])
            after()
            times.append(time.process_time() - start)
            if step % (steps // windows) == 0:
                gc.collect()
                seconds = statistics.median(times)
                yield Window(step, _rss(), _allocated(), len(gc.get_objects()), seconds)
                times = []


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=8, help="fewer than the demo's 256: steps count")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--most", type=float, default=4.0, metavar="MIB", help="growth that is no leak")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    arguments = parser.parse_args(argv)
    if arguments.steps % arguments.windows:
        parser.error("--steps must be a multiple of --windows")
    rows: list[dict[str, Any]] = []
    table = Table(title=f"{arguments.steps} steps, from the first window to the last", title_justify="left")
    for heading in ("training", "RSS, MiB", "allocated, MiB", "objects", "step, ms of the processor"):
        table.add_column(heading, justify="left" if heading == "training" else "right")
    grown = False
    for kind in arguments.kinds:
        windows = []
        for window in soak(kind, arguments.steps, arguments.windows, arguments.batch):
            windows.append(window)
            memory = f"RSS {window.rss / _MIB:.1f}, allocated {window.allocated / _MIB:.2f} MiB"
            print(
                f"{kind}, {window.steps}: {memory}, {window.objects} objects, {1e3 * window.seconds:.2f} ms",
                flush=True,
            )
        rows += [{"training": kind} | asdict(window) for window in windows]
        first, last = windows[0], windows[-1]
        pairs = (first.rss, last.rss), (first.allocated, last.allocated)
        grown |= any(after - before > arguments.most * _MIB for before, after in pairs)
        table.add_row(
            kind,
            *(f"{before / _MIB:.1f} to {after / _MIB:.1f}" for before, after in pairs),
            f"{first.objects:,} to {last.objects:,}",
            f"{1e3 * first.seconds:.2f} to {1e3 * last.seconds:.2f}",
        )
    Console(width=110).print(table)
    if arguments.json:
        save_rows(arguments.json, "benchmarks.soak", argv, rows)
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
