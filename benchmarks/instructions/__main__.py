"""Counts instructions and compares them with the committed figures: ``python -m benchmarks.instructions``."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.instructions.counted import AMOUNTS
from coreai_kernels import native

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "benchmarks/results/instructions.json"
TOLERANCE = 0.03
Counts = dict[str, dict[str, float]]
# Of kernels the engine's library; of calls torch's, too, and the interpreter's loop. What the rest of Python
# and the C library run is left out: hash tables and free lists make it depend on addresses, by a tenth.
OF_KERNELS = re.compile(r"/_C\b[^/ ]*\.so ")
OF_CALLS = re.compile(r"/_C[^/ ]*\.so |/lib(torch|c10)[^/ ]*\.so |_PyEval_EvalFrameDefault")


class ImpossibleError(Exception):
    """Why nothing can be counted here."""


def levels() -> list[str]:
    """Of the instruction sets that valgrind knows, those that run here; best last."""
    if native.extension is None:
        raise ImpossibleError(f"the native backend is not loaded: {native.missing} (make build)")
    built = native.extension.build_info()["cpu_isas"].split()
    running = built[: built.index(native.extension.cpu_capability()) + 1]
    return [level for level in running if level in ("generic", "avx2")]


def versions() -> dict[str, str]:
    """What the figures depend on."""
    assert native.extension is not None
    return {
        "compiler": native.extension.build_info()["compiler"],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def count(folder: Path, wanted: list[str]) -> Counts:
    """Instructions an element at each level, and instructions a call, of all cases."""
    valgrind, compiler = shutil.which("valgrind"), next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if valgrind is None or compiler is None:
        raise ImpossibleError("needs valgrind and a C++ compiler (Debian: apt install valgrind g++)")
    library = folder / "requests.so"
    source = Path(__file__).with_name("callgrind.cpp")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(library)], check=True)
    output = folder / "counts"
    command = [
        valgrind,
        "--tool=callgrind",
        "--instr-atstart=no",
        "--dump-line=no",
        f"--callgrind-out-file={output}",
    ]
    command += [sys.executable, "-m", "benchmarks.instructions.counted", str(library), *wanted]
    # Nothing that is different from run to run: hashes, threads.
    fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env={**os.environ, **fixed}, capture_output=True, text=True)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stderr[-3000:]}")

    return _slopes(folder)


def _slopes(folder: Path) -> Counts:
    totals: dict[tuple[str, str], dict[int, int]] = {}
    for path in folder.glob("counts.*"):
        text = path.read_text()
        if name := re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE):
            group, case, amount = name[1].split("|")
            counted = OF_CALLS if group == "calls" else OF_KERNELS
            totals.setdefault((group, case), {})[int(amount)] = instructions(text, counted)
    counts: Counts = {}
    for (group, case), found in sorted(totals.items()):
        few, many = AMOUNTS["calls" if group == "calls" else "kernels"]
        counts.setdefault(group, {})[case] = round((found[many] - found[few]) / (many - few), 3)
    return counts


def instructions(profile: str, counted: re.Pattern[str]) -> int:
    """Sum of what functions ran themselves, of those whose ``library function`` the pattern finds."""
    names: dict[str, str] = {}

    def full(text: str) -> str:  # "(7) name" defines a number, "(7)" uses it
        number, _, name = text.partition(" ")
        return names.setdefault(number, name)

    total, counts, skip, library = 0, False, False, ""
    for line in profile.splitlines():
        if line.startswith("ob="):
            library = full("ob" + line[3:])
        elif line.startswith("cob="):
            full("ob" + line[4:])
        elif line.startswith("fn="):
            counts = counted.search(f"{library} {full('fn' + line[3:])}") is not None
        elif line.startswith("cfn="):
            full("fn" + line[4:])
        elif line.startswith("calls="):
            skip = True  # the next line is what was called, with all that it called
        elif line[:1].isdigit() or line[:1] in "+-*":
            if counts and not skip and " " in line:  # a cost of zero is left out
                total += int(line.split()[1])
            skip = False
    return total


def compare(found: Counts, recorded: dict[str, Any], now: dict[str, str]) -> int:
    """Print a table; return how many counts are off by more than the tolerance."""
    off = 0
    for group, cases in found.items():
        unit = "instructions a call" if group == "calls" else "instructions an element"
        depends = list(now) if group == "calls" else ["compiler", "machine"]
        other = [
            f"{name} {recorded['versions'][name]}"
            for name in depends
            if recorded["versions"][name] != now[name]
        ]
        print(f"{group}: {unit}")
        if other:
            print(f"  not compared: the figures are those of {', '.join(other)}; here: {now}")
        for case, value in cases.items():
            before = recorded["counts"].get(group, {}).get(case)
            note = ""
            if before is None:
                note = "no figure (make count COUNT_FLAGS=--write)"
                off += not other
            elif abs(value / before - 1) > TOLERANCE:
                note = f"{before:g} recorded: {value / before - 1:+.1%}"
                if not other:
                    note += "  OFF"
                    off += 1
            print(f"  {case:40} {value:10.3f}  {note}")
        missing = set(recorded["counts"].get(group, {})) - set(cases)
        if missing:
            print(f"  recorded, and not counted: {sorted(missing)}")
            off += len(missing)
    return off


def main(argv: list[str] | None = None) -> int:
    """Count, and compare or write; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help="record what is counted as the new figures")
    parser.add_argument(
        "--optional", action="store_true", help="where counting is not possible, say so and succeed"
    )
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = count(Path(folder), levels())
    except ImpossibleError as reason:
        print(f"Instructions cannot be counted: {reason}", file=sys.stderr)
        return 0 if options.optional else 2
    now = versions()
    if options.write:
        FIGURES.write_text(json.dumps({"versions": now, "counts": found}, indent=1) + "\n")
        print(f"written: {FIGURES.relative_to(ROOT)}")
        return 0
    off = compare(found, json.loads(FIGURES.read_text()), now)
    if off:
        print(
            f"{off} counts are more than {TOLERANCE:.0%} off. What is slower needs a reason; a change that "
            "is meant is recorded with make count COUNT_FLAGS=--write",
            file=sys.stderr,
        )
    return int(off > 0)


if __name__ == "__main__":
    sys.exit(main())
