"""The command line: ``python -m benchmarks``."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.cases import DTYPES, Sweep
from benchmarks.harness import Effort
from benchmarks.report import Report, print_comparison, print_report
from benchmarks.suite import OPERATIONS, Options, available_threads, run

__all__ = ["main"]

_SIZES, _QUICK_SIZES = (64, 256, 1024, 2048, 4096), (64, 256, 1024)
_CAPABILITIES = ("generic", "avx2", "avx512", "neon")
_DEFAULT_APPLE = Path(".oracle")
_WIDTH_OF_A_FILE = 200


def _size(text: str) -> int:
    size = int(text)
    if size < 32 or size % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32; got {size}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Micro-benchmarks on this CPU.")
    add = parser.add_argument
    add("--op", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="NAME", help=", ".join(OPERATIONS))
    add("--sizes", nargs="+", type=_size, help=f"rows of the square matrices (default {_SIZES})")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    add("--threads", nargs="+", type=int, help="default: 1 and 2; with --quick 1")
    add("--apple", metavar="PATH", help="folder with Apple's package (default: .oracle), or 'none'")
    add("--compile", action="store_true", help="torch.compile the reference of every case; takes long")
    add("--json", type=Path, metavar="OUT", help="write all figures")
    add("--plot", type=Path, metavar="OUT.png", help="draw them")
    add("--compare", type=Path, metavar="OLD.json", help="print the speed-up over an older run")
    add("--quick", action="store_true", help="fewer and shorter: less than a minute")
    add("--fastest", action="store_true", help="on a busy machine: fastest samples instead of medians")
    add("--summary", action="store_true", help="print no table of single cases")
    add("--cpu-capability", choices=_CAPABILITIES, help="limit the instruction set; torch's, too")
    add("--huge-pages", action="store_true", help="ask the system for huge pages (THP_MEM_ALLOC_ENABLE=1)")
    return parser


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Variables that must be set before the interpreter starts, and are not yet."""
    wanted = {}
    if arguments.cpu_capability:
        torch_names = {"generic": "default", "neon": "default"}
        torch_name = torch_names.get(arguments.cpu_capability, arguments.cpu_capability)
        wanted = {"COREAI_CPU_CAPABILITY": arguments.cpu_capability, "ATEN_CPU_CAPABILITY": torch_name}
    if arguments.huge_pages:
        wanted["THP_MEM_ALLOC_ENABLE"] = "1"
    return {name: value for name, value in wanted.items() if os.environ.get(name) != value}


def _apple(text: str | None) -> Path | None:
    if text == "none":
        return None
    if text is None:
        return _DEFAULT_APPLE if _DEFAULT_APPLE.is_dir() else None
    return Path(text)


def _options(arguments: argparse.Namespace, command: str) -> Options:
    quick = arguments.quick
    effort = Effort(rounds=3, sample_seconds=1e-3) if quick else Effort()
    threads = tuple(arguments.threads or (available_threads()[:1] if quick else available_threads()))
    sizes = tuple(arguments.sizes or (_QUICK_SIZES if quick else _SIZES))
    return Options(
        operations=tuple(arguments.op),
        sweep=Sweep(sizes, tuple(arguments.dtypes), threads, quick),
        effort=replace(effort, fastest=arguments.fastest),
        apple=_apple(arguments.apple),
        compile="all" if arguments.compile else "none" if quick else "sample",
        command=command,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    environment = _environment(arguments)
    if environment:
        # Libraries read these when they are loaded.
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *argv], os.environ | environment)
    old = Report.load(arguments.compare) if arguments.compare else None
    report = run(_options(arguments, shlex.join(["python", "-m", "benchmarks", *argv])))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_A_FILE)
    print_report(report, console, details=not arguments.summary)
    if arguments.json:
        report.save(arguments.json)
    if arguments.plot:
        from benchmarks.plot import save_plot

        save_plot(report, arguments.plot)
    if old is not None:
        print_comparison(report, old, console)
    return 0
