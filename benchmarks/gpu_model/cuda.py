"""The CUDA C++ kernels in machine code.

What one thread does is a loop over tiles, or over parts of a block. Of a kernel that serves many kinds of
steps a copy is counted to which the kind is known: what other kinds need is gone from it.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

from benchmarks.gpu_model.loops import count_loops
from benchmarks.gpu_model.model import Kernel
from coreai_kernels.formats import Format, ScaleFormat, native_header
from coreai_kernels.types import RangeUpdate, Scheme

__all__ = [
    "Body",
    "backward",
    "choose",
    "forward",
    "kernels",
    "largest_first",
    "nvcc",
    "observe",
    "step",
    "units",
]

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr")
_ELEMENTS = {4: 0, 2: 1}  # codes of Element, by size
_PACK = 16  # bytes
_UNROLL = 4  # packs of a thread
_WARPS = 8  # of a block of threads

_SECTION = re.compile(r"(?m)^\.text\.([\w$]+):")
_CODES = re.compile(r"L(?:[bi]|NS\d?_\d+[A-Za-z]+E|S\d?_)(\d+)E")


@dataclass(frozen=True)
class Body:
    """A kernel, and what of a large tensor one thread of it has.

    Attributes:
        kernel: name of the template.
        codes: its arguments, by number, as they are in the name of the compiled kernel.
        elements: that a thread takes in one round of the innermost loop with wide loads.
        read, written: bytes of large tensors an element.
        rounds: of that loop, in one of the loop around it or, without one, in the whole kernel, and as many
            of the loop that stores, if it's another one. 0: what is around it is done once for many elements,
            and is not counted.
        threads: in a block.
        alone: which of the stretches around that loop between one barrier and the next have work for so many
            warps only.
    """

    kernel: str
    codes: tuple[int, ...]
    elements: float
    read: float
    written: float
    rounds: float = 0
    threads: int = 32 * _WARPS
    alone: Mapping[int, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class _Template:
    """How a kernel is instantiated.

    Attributes:
        header: below csrc/cuda.
        job: parameters of the kernel.
        arguments: of the template, by their codes.
        copy: source of the kernel, where it is a copy that knows more than the original. The kernels of the
            header are functions for it.
    """

    header: str
    job: str
    arguments: str
    copy: str = ""


def _copy(name: str, template: str, blocks: str, job: str, known: str, body: str) -> str:
    return (
        f"template <{template}> __attribute__((global)) void\n"
        f"__attribute__((launch_bounds(kThreads, {blocks}))) {name}({job} job) {{\n  {known}\n  {body}\n}}\n"
    )


_KIND = "Kind<Format({}), bool({}), Division({})>, Element({})"
_RULE = "Scheme kScheme, RangeUpdate kUpdate, ScaleFormat kScale"
_RULE_CODES = "Scheme({}), RangeUpdate({}), ScaleFormat({})"
_KNOWN_UPDATE = (
    "job.after.update.update = kUpdate, job.after.update.has_running = true;"
    " job.after.update.fix_low = job.after.update.fix_high = false;"
)
_KNOWN_RULE = f"job.after.rule.scheme = kScheme, job.after.rule.scale_format = kScale; {_KNOWN_UPDATE}"
_KNOWN_AFTER = (
    "job.after.element = kElement, job.after.is_step = kStep;"
    " job.after.chooses = kScale != ScaleFormat::kE4M3;"
    f" job.after.rule.format = kFormat, job.after.rule.rounding = kElement; {_KNOWN_RULE}"
    " job.finishes = kFinishes;"
)


def _step_template(
    name: str,
    function: str,
    job: str,
    blocks: str,
    held: bool = False,
    more: str = "",
    known: str = "",
    header: str = "observe_and_fake_quantize",
    first: str = "K, kElement",
) -> _Template:
    template = "class K, Element kElement, " + ("int kHeld, " if held else "") + _RULE
    arguments = first + (", kHeld" if held else "") + more
    return _Template(
        f"quantize/{header}.cuh",
        job,
        f"{_KIND}, " + ("int({}), " if held else "") + _RULE_CODES,
        _copy(name, template, blocks, job, _KNOWN_RULE + known, f"{function}<{arguments}>(job);"),
    )


def _observe_template(name: str, call: str, blocks: str, more: str = "") -> _Template:
    template = f"Element kElement, bool kStep, bool kFinishes, Format kFormat, {_RULE}"
    return _Template(
        "quantize/observe_range.cuh",
        "ObserveJob",
        "Element({}), bool({}), bool({}), Format({}), " + _RULE_CODES,
        _copy(name, template, blocks, "ObserveJob", _KNOWN_AFTER + more, call),
    )


# Of held tensors: what merges ranges of warps, waits for other blocks, and chooses.
_ALONE = {0: 1, 1: 1, 3: 1}
_CHOOSE_KNOWN = (
    "job.rule.scheme = kScheme, job.rule.scale_format = kScale; job.rule.format = kFormat;"
    " job.rule.rounding = kElement;"
)
_TEMPLATES = {
    "fake_quantize_runs": _Template("quantize/fake_quantize.cuh", "RunsJob", f"{_KIND}, Runs({{}})"),
    "fake_quantize_columns": _Template("quantize/fake_quantize.cuh", "ColumnsJob", _KIND),
    "masked_gradient": _Template("quantize/masked_gradient.cuh", "GradientJob", "Element({}), bool({})"),
    "counted_rows": _step_template(
        "counted_rows", "step_rows", "StepJob", "kHeld > kUnroll ? 2 : 4", held=True
    ),
    "counted_short_runs": _step_template(
        "counted_short_runs",
        "step_short_runs",
        "StepJob",
        "kHeld > kUnroll ? 2 : 3",
        held=True,
        more=", std::conditional_t<kScale == ScaleFormat::kE8M0, PowerLane, QuickLane>",
        known=" job.packs = kHeld;",
    ),
    "counted_tensor": _step_template("counted_tensor", "step_tensor", "TensorStepJob", "1"),
    "counted_held_tensor": _step_template(
        "counted_held_tensor", "step_held_tensor", "HeldJob", "kHeldBlocks", header="held_steps"
    ),
    "counted_held_columns": _step_template(
        "counted_held_columns",
        "step_held_columns",
        "HeldColumnsJob",
        "kHeldBlocks",
        known=" job.parts = 4;",
        header="held_steps",
    ),
    "counted_held_nvfp4": _step_template(
        "counted_held_nvfp4",
        "step_held_nvfp4",
        "HeldJob",
        "kHeldBlocks",
        header="held_steps",
        first="kElement",
    ),
    "observed_short_runs": _observe_template(
        "observed_short_runs", "observe_short_runs<kElement>(job);", "1"
    ),
    "observed_blocks": _observe_template(
        "observed_blocks", "observe_blocks<kElement, true>(job);", "3", " job.geometry.outer_axes = 0;"
    ),
    "observed_columns": _observe_template("observed_columns", "observe_columns<kElement>(job);", "1"),
    "chosen_parameters": _Template(
        "quantize/qparams.cuh",
        "ChooseJob",
        "Element({}), Format({}), Scheme({}), ScaleFormat({})",
        _copy(
            "chosen_parameters",
            "Element kElement, Format kFormat, Scheme kScheme, ScaleFormat kScale",
            "1",
            "ChooseJob",
            _CHOOSE_KNOWN,
            "choose_parameters<>(job);",
        ),
    ),
    "largest_of_blocks": _Template(
        "quantize/qparams.cuh",
        "const float*, const float*, int64_t, float*",
        "bool({})",
        "template <bool> __attribute__((global)) void __attribute__((launch_bounds(kThreads)))\n"
        "largest_of_blocks(const float* low, const float* high, int64_t blocks, float* largest) {\n"
        "  largest_magnitudes<>(low, high, blocks, largest);\n}\n",
    ),
    "count_digits": _Template(
        "select.cuh",
        "const WordOf<Element({0})>*, int64_t, int64_t, int, int, const State*, Count*",
        "Element({0}), Element({0})",
    ),
    "write_mask": _Template(
        "select.cuh",
        "const WordOf<Element({0})>*, WordOf<Element({0})>*, int64_t, int64_t, const State*, const Count*",
        "Element({0}), Element({0})",
    ),
}


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


# Which kernels an operation takes, on a matrix of 1024 x 4096.


def _size(dtype_size: int) -> int:
    """Elements of a pack."""
    return _PACK // dtype_size


def forward(fmt: Format, blocks: str, size: int) -> Sequence[Body]:
    """``fake_quantize`` of elements of ``size`` bytes."""
    kind = (int(fmt), 0, 0, _ELEMENTS[size])
    traffic = (size, size + 1 / 8)
    if blocks == "columns":
        return (Body("fake_quantize_columns", kind, 2 * _size(size), *traffic),)
    # A single block; of at least kUnroll packs; shorter.
    runs = {"tensor": 0, "blocks of 16": 2 if size == 2 else 1}.get(blocks, 1)
    return (Body("fake_quantize_runs", (*kind, runs), _UNROLL * _size(size), *traffic),)


def backward(size: int, in_place: bool) -> Sequence[Body]:
    """The gradient of ``fake_quantize``; in place with nothing that passes whole."""
    codes = (_ELEMENTS[size], int(in_place))
    return (Body("masked_gradient", codes, _UNROLL * _size(size), size + 1 / 8, size),)


def _rule(scheme: Scheme, update: RangeUpdate, scales: ScaleFormat) -> tuple[int, ...]:
    return int(scheme), int(update), int(scales)


def observe(
    blocks: str,
    size: int,
    *,
    fmt: Format = Format.INT,
    rule: tuple[Scheme, RangeUpdate, ScaleFormat] | None = None,
    finishes: bool = True,
) -> Sequence[Body]:
    """``observe_range``, or with a rule what a step does before it quantizes.

    What merges the parts of a block is left out.
    """
    codes = (_ELEMENTS[size], int(rule is not None), int(finishes), int(fmt))
    codes += _rule(*(rule or (Scheme.SYMMETRIC, RangeUpdate.LATEST, ScaleFormat.FLOAT32)))
    elements = _UNROLL * _size(size)
    if blocks.startswith("blocks"):
        return (Body("observed_short_runs", codes, elements, size, 0),)
    if blocks == "columns":  # 64 rows by 32 packs a block of threads, which merges and stores what it finds
        codes = (*codes[:2], 0, *codes[3:])
        return (Body("observed_columns", codes, elements, size, 0, rounds=2),)
    if blocks == "tensor":  # two rounds for each thread, and one block
        codes = (*codes[:2], 0, *codes[3:])
        return (Body("observed_blocks", codes, elements, size, 0, rounds=2),)
    # A row for a warp in bfloat16, for eight warps in float32.
    return (Body("observed_blocks", codes, elements, size, 0, rounds=4 if size == 2 else 1),)


def step(
    fmt: Format, blocks: str, size: int, rule: tuple[Scheme, RangeUpdate, ScaleFormat], held: int = 4
) -> Sequence[Body]:
    """``observe_and_fake_quantize``. ``held``: packs of a row for each thread, 4 or 8."""
    kind, traffic = (int(fmt), 0, 0, _ELEMENTS[size]), (size, size + 1 / 8)
    codes, elements = (*kind, *_rule(*rule)), _UNROLL * _size(size)
    if blocks == "tensor" or rule[2] == ScaleFormat.E4M3:
        kernel = "counted_held_tensor" if blocks == "tensor" else "counted_held_nvfp4"
        rounds = 2 if size == 2 else 3  # tiles of a block of threads, about as many on all four GPUs
        return (Body(kernel, codes, elements, *traffic, rounds=rounds, alone=_ALONE),)
    if blocks == "columns":  # a block of threads has 8 packs across and a fourth or a third of the rows
        rows, rounds = (1024 / 4, 4) if size == 2 else (1024 / 3, 3)
        elements = rows / 32 * _size(size) / rounds
        chosen_by = _size(size) // 4  # warps
        alone = {2: chosen_by, 4: chosen_by}
        return (Body("counted_held_columns", codes, elements, *traffic, rounds=rounds, alone=alone),)
    if blocks == "rows":
        return (Body("counted_rows", (*kind, held, *_rule(*rule)), held * _size(size), *traffic),)
    held = _UNROLL if size == 2 else 2 * _UNROLL
    return (Body("counted_short_runs", (*kind, held, *_rule(*rule)), held * _size(size), *traffic),)


def larger_step(
    fmt: Format, blocks: str, size: int, rule: tuple[Scheme, RangeUpdate, ScaleFormat]
) -> Sequence[Body]:
    """The same of a tensor that all multiprocessors together have no room for."""
    first = observe(blocks, size, fmt=fmt, rule=rule, finishes=blocks != "tensor")
    if blocks == "tensor":
        codes = (int(fmt), 0, 0, _ELEMENTS[size], *_rule(*rule))
        return (*first, Body("counted_tensor", codes, _UNROLL * _size(size), size, size + 1 / 8))
    if rule[2] != ScaleFormat.E4M3:
        return (*first, *forward(fmt, blocks, size))
    elements = int(blocks.removeprefix("blocks of "))
    chosen = (*largest_first(elements), *choose(fmt, rule[0], rule[2], elements))
    return (*first, *chosen, *forward(fmt, blocks, size))


def largest_first(elements: int = 1) -> Sequence[Body]:
    """The largest magnitude of all blocks, for scales of two levels; ``elements``: of a block."""
    return (Body("largest_of_blocks", (0,), elements, 8 / elements, 0),)


def choose(fmt: Format, scheme: Scheme, scales: ScaleFormat, elements: int = 1) -> Sequence[Body]:
    """``choose_qparams``, of blocks of so many elements."""
    codes = (0, int(fmt), int(scheme), int(scales))
    return (Body("chosen_parameters", codes, elements, 8 / elements, 12 / elements),)


def largest_magnitudes(size: int) -> Sequence[Body]:
    """``topk_mask``, whose threshold divides no ties: 11 bits of the magnitude a pass, then the mask."""
    codes = (_ELEMENTS[size],) * 2
    passes = 3 if size == 4 else 2
    count = Body("count_digits", codes, _size(size), size, 0, threads=512)
    return (*[count] * passes, Body("write_mask", codes, _size(size), size, size, threads=512))


_found: dict[tuple[Body, int], Kernel] = {}


def kernels(bodies: Sequence[Body], arch: int) -> list[Kernel]:
    """The kernels compiled for an architecture, and counted; what was compiled before is remembered.

    Raises:
        RuntimeError: there is no nvcc, or it fails; the text has its output.
        ValueError: a kernel needs memory of a thread's own, or has no main loop.
    """
    missing = [body for body in dict.fromkeys(bodies) if (body, arch) not in _found]
    for unit in units(missing):
        for body, kernel in _examine(unit, arch).items():
            _found[body, arch] = kernel
    return [_found[body, arch] for body in bodies]


def units(bodies: Iterable[Body]) -> list[list[Body]]:
    """Kernels that are compiled together: those of a header."""
    by_header: dict[tuple[str, bool], list[Body]] = {}
    for body in dict.fromkeys(bodies):
        template = _TEMPLATES[body.kernel]
        by_header.setdefault((template.header, bool(template.copy)), []).append(body)
    return list(by_header.values())


def _examine(bodies: Sequence[Body], arch: int) -> dict[Body, Kernel]:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc was not found: install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as name:
        cubin = _compile(compiler, bodies, arch, Path(name))
        listing = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    _, *sections = _SECTION.split(listing)
    listings = dict(zip(sections[::2], sections[1::2], strict=True))
    used = {
        function: {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
        for function, line in re.findall(r"Function (\w+):\s*\n(.*)", usage)
    }
    return {body: _counted(body, arch, *_own(body, listings, used)) for body in bodies}


# Kernels become functions, which copies call; without the launches that would be theirs.
_AS_FUNCTIONS = """#include "cuda/grid.cuh"
#undef COREAI_LAUNCH
#define COREAI_LAUNCH(...)
#pragma push_macro("__global__")
#pragma push_macro("__launch_bounds__")
#undef __global__
#undef __launch_bounds__
#define __global__ static __device__ __forceinline__
#define __launch_bounds__(...)
#include "cuda/{header}"
#pragma pop_macro("__global__")
#pragma pop_macro("__launch_bounds__")
"""


def _compile(compiler: str, bodies: Sequence[Body], arch: int, folder: Path) -> Path:
    formats = folder / "common/formats.h"
    formats.parent.mkdir()
    formats.write_text(native_header())
    first = _TEMPLATES[bodies[0].kernel]
    include = "#include <type_traits>\n" + (_AS_FUNCTIONS if first.copy else '#include "cuda/{header}"\n')
    lines = [include.replace("{header}", first.header), "namespace coreai::cuda {"]
    lines += [_TEMPLATES[name].copy for name in sorted({body.kernel for body in bodies})]
    for name, codes in dict.fromkeys((body.kernel, body.codes) for body in bodies):
        template = _TEMPLATES[name]
        arguments, job = template.arguments.format(*codes), template.job.format(*codes)
        lines.append(f"template __attribute__((global)) void {name}<{arguments}>({job});")
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text("\n".join([*lines, "}", ""]))
    command = [compiler, *FLAGS, f"-arch=sm_{arch}", "-cubin", f"-I{CSRC}", f"-I{folder}"]
    done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed: {done.stderr[-3000:]}")
    return cubin


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _own(body: Body, listings: dict[str, str], used: dict[str, dict[str, int]]) -> tuple[str, dict[str, int]]:
    """Listing and resources of a kernel."""
    for name, listing in listings.items():
        codes = tuple(int(code) for code in _CODES.findall(name))
        if f"{len(body.kernel)}{body.kernel}I" in name and codes[: len(body.codes)] == body.codes:
            return f".text.{name}:{listing}", used[name]
    raise ValueError(f"the compiled kernels have no {body.kernel} of {body.codes}; they are {list(listings)}")


def _counted(body: Body, arch: int, listing: str, used: dict[str, int]) -> Kernel:
    if used["STACK"] or used["LOCAL"]:
        raise ValueError(f"{body.kernel} of {body.codes} spills: {used}")
    counts = count_loops(listing)
    issued = counts.inside - (1 - 1 / _WARPS) * counts.between_barriers
    if body.rounds:
        around = counts.between_barriers_around
        others = sum((1 - warps / _WARPS) * around[i] for i, warps in body.alone.items())
        more = (body.rounds - 1) * (counts.inside + counts.storing)
        if counts.storing:
            more -= counts.ahead * counts.inside
        issued = (counts.around - others + more) / body.rounds
    return Kernel(
        name=body.kernel,
        arch=arch,
        instructions=issued / body.elements,
        bytes_loaded=body.read,
        bytes_stored=body.written,
        registers=used["REG"],
        shared=used.get("SHARED", 0),
        threads_in_block=body.threads,
        in_flight=counts.in_flight,
    )
