"""The CUDA C++ kernels in machine code: ``python -m benchmarks.gpu_model.cuda``.

Their main path is a loop over tiles: what is done once for a thread is spread over many elements. Loops in
it, which take elements out of the ordinary one by one, are no part of the path; all else is. What lies
between two barriers one warp of eight does for all. Of a kernel that serves many kinds of steps a copy is
counted to which the kind is known: what other kinds need is gone from it, but for the branches.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_model.devices import DEVICES
from benchmarks.gpu_model.model import Kernel, shares
from benchmarks.gpu_model.variants import Variant
from coreai_kernels.formats import Format, ScaleFormat, native_header
from coreai_kernels.types import RangeUpdate, Scheme

__all__ = ["CASES", "Case", "examine", "main", "nvcc"]

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr")
THREADS = 256
_WARPS = THREADS // 32

_SECTION = re.compile(r"(?m)^\.text\.([\w$]+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
# In a copy with known settings the compiler may not know any more that an address is global.
_WIDE_LOADS = ("LDG.E.128", "LD.E.128")
_CODES = re.compile(r"L(?:[bi]|NS\d?_\d+[A-Za-z]+E)(\d+)E")


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        operation, case, dtype: names for the table.
        kernel: the template's name.
        codes: its arguments, by number, as they are in the name of the compiled kernel.
        elements: that a thread takes in one round of the loop.
        read, written: bytes of large tensors an element.
        budget: instructions an element.
    """

    operation: str
    case: str
    dtype: str
    kernel: str
    codes: tuple[int, ...]
    elements: int
    read: float
    written: float
    budget: float


# Header below csrc/cuda, type of the argument, and the template's arguments by their codes.
_TEMPLATES = {
    "fake_quantize_runs": (
        "quantize/fake_quantize.cuh",
        "RunsJob",
        "Kind<Format({}), bool({}), Division({})>, Element({}), Runs({})",
    ),
    "fake_quantize_columns": (
        "quantize/fake_quantize.cuh",
        "ColumnsJob",
        "Kind<Format({}), bool({}), Division({})>, Element({})",
    ),
    "masked_gradient": ("quantize/masked_gradient.cuh", "GradientJob", "Element({}), bool({})"),
}
# Steps, with their settings beside the template's arguments: scheme, update of the range, format of scales.
_STEPS = {
    "counted_rows": ("step_rows", "StepJob", "int({})", "kHeld > kUnroll ? 2 : 4"),
    "counted_short_runs": ("step_short_runs", "StepJob", "int({})", "kHeld > kUnroll ? 2 : 3"),
    "counted_tensor": ("step_tensor", "TensorStepJob", "", "1"),
}
_ARGUMENTS = {
    "counted_short_runs": ", kHeld, std::conditional_t<kScale == ScaleFormat::kE8M0, PowerLane, QuickLane>"
}
# The length of runs, too: of blocks of 32 in packs.
_SETTINGS = {"counted_short_runs": "job.packs = kHeld;"}
_COUNTED = """
template <class K, Element kElement, {parameters}Scheme kScheme, RangeUpdate kUpdate, ScaleFormat kScale>
__global__ void __launch_bounds__(kThreads, {blocks}) {name}({job} job) {{
  job.after.rule.scheme = kScheme, job.after.rule.scale_format = kScale;
  job.after.update.update = kUpdate, job.after.update.has_running = true;
  job.after.update.fix_low = job.after.update.fix_high = false;
  {settings}
  {function}<K, kElement{arguments}>(job);
}}
"""
for _name, (_, _job, _more, _) in _STEPS.items():
    _given = "Scheme({}), RangeUpdate({}), ScaleFormat({})"
    _TEMPLATES[_name] = (
        "quantize/observe_and_fake_quantize.cuh",
        _job,
        "Kind<Format({}), bool({}), Division({})>, Element({}), " + (f"{_more}, " if _more else "") + _given,
    )
_DTYPES = {"fp32": (0, 4), "bf16": (1, 2)}
_FORMATS = {"int4, int8": Format.INT, "fp8": Format.E4M3, "fp4": Format.E2M1}
# By the code of Runs; of 32-bit elements blocks of 16 are long.
_RUNS = {0: "tensor", 1: "rows, blocks of 32", 2: "blocks of 16"}


def _cases() -> Iterator[Case]:
    for dtype, (element, size) in _DTYPES.items():
        pack = 16 // size
        traffic = (size, size + 1 / 8)
        budget = 16 if size == 2 else 20
        for name, fmt in _FORMATS.items():
            for runs, blocks in _RUNS.items():
                codes = (int(fmt), 0, 0, element, runs)
                case = f"{name}, {blocks}" if runs != 2 or size == 2 else f"{name}, blocks of 8"
                yield Case(
                    "forward", case, dtype, "fake_quantize_runs", codes, 4 * pack, *traffic, budget=budget
                )
            codes = (int(fmt), 0, 0, element)
            case = f"{name}, columns"
            yield Case(
                "forward", case, dtype, "fake_quantize_columns", codes, 2 * pack, *traffic, budget=budget
            )
        for flag, case in enumerate(("", "in place")):
            codes = (element, flag)
            yield Case(
                "backward", case, dtype, "masked_gradient", codes, 4 * pack, size + 1 / 8, size, budget=6
            )


def _steps() -> Iterator[Case]:
    int4 = (Format.INT, Scheme.SYMMETRIC, RangeUpdate.LATEST, ScaleFormat.FLOAT32)
    average = (Format.INT, Scheme.ASYMMETRIC, RangeUpdate.MOVING_AVERAGE, ScaleFormat.FLOAT32)
    fp8 = (Format.E4M3, Scheme.SYMMETRIC, RangeUpdate.LATEST, ScaleFormat.FLOAT32)
    mxfp4 = (Format.E2M1, Scheme.SYMMETRIC, RangeUpdate.LATEST, ScaleFormat.E8M0)
    mxint8 = (Format.INT, Scheme.SYMMETRIC, RangeUpdate.LATEST, ScaleFormat.E8M0)
    for dtype, (element, size) in _DTYPES.items():
        pack = 16 // size
        for name, (fmt, scheme, update, scales), ways in (
            ("int4, int8", int4, ("tensor", "rows", "longer rows", "blocks of 32")),
            ("uint8, averaged", average, ("tensor", "rows", "longer rows", "blocks of 32")),
            ("fp8", fp8, ("tensor", "rows", "longer rows")),
            ("MXFP4", mxfp4, ("blocks of 32",)),
            ("MXINT8", mxint8, ("blocks of 32",)),
        ):
            kind = (int(fmt), 0, 0, element)
            settings = (int(scheme), int(update), int(scales))
            for way in ways:
                held = 8 if way == "longer rows" or (way == "blocks of 32" and size == 4) else 4
                more = () if way == "tensor" else (held,)
                kernel = {"tensor": "counted_tensor", "blocks of 32": "counted_short_runs"}.get(
                    way, "counted_rows"
                )
                yield Case(
                    *("step", f"{name}, {way}", dtype, kernel, (*kind, *more, *settings), held * pack),
                    # A whole tensor is read twice, the second time from the cache if it has room for it.
                    *(size * (1 + (way == "tensor")), size + 1 / 8),
                    budget=20 if size == 2 else 24,
                )


CASES: Sequence[Case] = (*_cases(), *_steps())


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def examine(cases: Sequence[Case], arch: int) -> dict[Case, Kernel]:
    """Compile kernels for an architecture, and count what their main loops do.

    Raises:
        RuntimeError: there is no nvcc, or it fails; the text has its output.
        ValueError: a kernel needs memory of a thread's own.
    """
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found: install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as name:
        cubin = _compile(compiler, cases, arch, Path(name))
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    _, *sections = _SECTION.split(listing)
    bodies = dict(zip(sections[::2], sections[1::2], strict=True))
    used = {
        function: {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for function, line in re.findall(r"Function (\w+):\s*\n(.*)", usage)
    }
    return {case: _counted(case, arch, *_own(case, bodies, used)) for case in cases}


def _compile(compiler: str, cases: Sequence[Case], arch: int, folder: Path) -> Path:
    formats = folder / "common/formats.h"
    formats.parent.mkdir()
    formats.write_text(native_header())
    lines = ["#include <type_traits>"]
    lines += [
        f'#include "cuda/{header}"' for header in sorted({_TEMPLATES[case.kernel][0] for case in cases})
    ]
    lines.append("namespace coreai::cuda {")
    for name in sorted({case.kernel for case in cases} & set(_STEPS)):
        function, job, more, blocks = _STEPS[name]
        lines.append(
            _COUNTED.format(
                name=name,
                function=function,
                settings=_SETTINGS.get(name, ""),
                job=job,
                blocks=blocks,
                parameters="int kHeld, " if more else "",
                arguments=_ARGUMENTS.get(name, ", kHeld" if more else ""),
            )
        )
    for case in cases:
        _, job, arguments = _TEMPLATES[case.kernel]
        lines.append(f"template __global__ void {case.kernel}<{arguments.format(*case.codes)}>({job});")
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text("\n".join([*lines, "}", ""]))
    command = [compiler, *FLAGS, f"-arch=sm_{arch}", "-cubin", f"-I{CSRC}", f"-I{folder}"]
    done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {done.stderr[-3000:]}")
    return cubin


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _own(case: Case, bodies: dict[str, str], used: dict[str, dict[str, int]]) -> tuple[str, dict[str, int]]:
    """Listing and resources of a case's kernel."""
    for name, body in bodies.items():
        codes = tuple(int(code) for code in _CODES.findall(name))
        if f"{len(case.kernel)}{case.kernel}I" in name and codes == case.codes:
            return body, used[name]
    raise ValueError(f"the compiled kernels have no {case.kernel} of {case.codes}; they are {list(bodies)}")


def _counted(case: Case, arch: int, listing: str, used: dict[str, int]) -> Kernel:
    if used["STACK"] or used["LOCAL"]:
        raise ValueError(f"{case.kernel} of {case.codes} spills: {used}")
    names = _main_loop(listing)
    wide = sum(name.startswith(_WIDE_LOADS) for name in names)
    return Kernel(
        name=case.kernel,
        arch=arch,
        instructions=(len(names) - (1 - 1 / _WARPS) * _between_barriers(names)) / case.elements,
        bytes_loaded=case.read,
        bytes_stored=case.written,
        registers=used["REG"],
        shared=used.get("SHARED", 0),
        threads_in_block=THREADS,
        in_flight=16 * wide,
    )


def _between_barriers(names: Sequence[str]) -> int:
    """How many instructions lie between the barriers of a loop, which one warp does for all."""
    barriers = [i for i, name in enumerate(names) if name.startswith("BAR.SYNC")]
    return barriers[-1] - barriers[0] - 1 if len(barriers) == 2 else 0


def _main_loop(listing: str) -> list[str]:
    """Instructions of the loop with the most wide loads, without the loops inside of it."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            if instruction[1].startswith("BRA") and (
                target := re.search(r"`\((\.L_x_\d+)\)", instruction[2])
            ):
                branches.append((len(names), target[1]))
            names.append(instruction[1])
    loops = [(labels[target], end) for end, target in branches if labels.get(target, end) < end]

    def wide(loop: tuple[int, int]) -> int:
        return sum(name.startswith(_WIDE_LOADS) for name in names[loop[0] : loop[1] + 1])

    first, last = max(loops, key=lambda loop: (wide(loop), loop[1] - loop[0]))
    inside = [loop for loop in loops if first <= loop[0] and loop[1] <= last and loop != (first, last)]
    return [
        names[i]
        for i in range(first, last + 1)
        if names[i] != "NOP" and not any(a <= i <= b for a, b in inside)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model.cuda", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures")
    arguments = parser.parse_args(argv)
    found = {arch: examine(CASES, arch) for arch in sorted({device.arch for device in DEVICES.values()})}
    table = Table(
        title="Main loops of the CUDA C++ kernels, and the share of the copy bandwidth that they allow"
    )
    archs = [f"sm_{arch}" for arch in found]
    for heading in ("operation", "case", "dtype", *archs, "budget", "registers", *DEVICES):
        table.add_column(heading, justify="left" if heading in ("operation", "case") else "right")
    rows = []
    for case in CASES:
        kernels = {arch: found[arch][case] for arch in found}
        variant = Variant(
            case.operation, case.case, case.dtype, lambda: None, case.elements, case.read, case.written
        )
        reached = {name: shares(variant, [kernels[device.arch]], name) for name, device in DEVICES.items()}
        rows.append(
            asdict(case) | {"kernels": [asdict(each) for each in kernels.values()], "devices": reached}
        )
        table.add_row(
            *(case.operation, case.case, case.dtype),
            *(f"{each.instructions:.1f}" for each in kernels.values()),
            f"{case.budget:g}",
            str(max(each.registers for each in kernels.values())),
            *(f"{each['share']:.0%} {each['bound']}" for each in reached.values()),
        )
    Console(width=170).print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
