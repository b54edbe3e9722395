"""CUDA C++ without a GPU: compiled for the CPU to run, and by nvcc to look at."""

import ctypes
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coreai_kernels.formats import native_header
from coreai_kernels.reference.layout import memory_order

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURES = (80, 90, 100)
TARGET_VERSION = "0x020a000000000000ULL"
TORCH_HEADERS = str(Path(torch.__file__).parent / "include")
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_libraries = {name: torch.library.Library(name, "DEF") for name in ("coreai_emulated", "coreai_recorded")}
_registered: set[str] = set()


def includes(folder: Path) -> list[str]:
    """Where the headers are: the project's, and the one that is made from the table of formats."""
    header = folder / "include/common/formats.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.write_text(native_header())
    return [f"-I{ROOT / 'csrc'}", f"-I{folder / 'include'}"]


def emulated(name: str, folder: Path, threads: int = 64, *defines: str) -> ctypes.CDLL:
    """``emulation/{name}.cpp``, whose blocks of so many threads take turns on the CPU.

    What it registers with torch's dispatcher is for CPU tensors, in the namespace ``coreai_emulated``. It is
    compiled once for all workers of the tests.
    """
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    shared = folder.parents["PYTEST_XDIST_WORKER" in os.environ]
    stem = "-".join([name, str(threads), *defines])
    with (shared / f"{stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = shared / f"{stem}.so"
        if not library.exists():
            os.replace(_compile(name, folder, threads, *defines), library)
    return ctypes.CDLL(str(library))


def _compile(name: str, folder: Path, threads: int, *defines: str) -> Path:
    library = folder / f"{name}.so"
    command = [str(COMPILER), "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    command += [f"-DCOREAI_EMULATED_THREADS={threads}", *defines]
    command += [*includes(folder), f"-I{ROOT / 'tests/kernels'}"]
    command += [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", "-isystem", TORCH_HEADERS]
    command += ["-o", str(library), str(ROOT / f"tests/kernels/emulation/{name}.cpp")]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return library


def _with_schemas(namespace: str, operators: Sequence[str], library: ctypes.CDLL) -> ctypes.CDLL:
    # The fixtures of a module are set up again when a worker returns to it; what was registered stays.
    if library._name not in _registered:
        for operator in operators:
            schema = str(getattr(torch.ops.coreai_kernels, operator).default._schema)
            _libraries[namespace].define(schema.removeprefix("coreai_kernels::"))
        torch.ops.load_library(library._name)
        _registered.add(library._name)
    return library


def emulated_operators(name: str, operators: Sequence[str], folder: Path) -> ctypes.CDLL:
    """The same, with the schemas of such operators of ``coreai_kernels`` for what it registers."""
    return _with_schemas("coreai_emulated", operators, emulated(name, folder))


def recorded_operators(name: str, operators: Sequence[str], folder: Path) -> ctypes.CDLL:
    """The same in ``coreai_recorded``; kernels are not run, but told to whom ``tell`` names."""
    return _with_schemas("coreai_recorded", operators, emulated(name, folder, 256, "-DCOREAI_RECORDED"))


def build_emulated_gpu(folder: Path, *defines: str, threads: int = 64) -> None:
    """What ``emulated_gpu`` loads: two GPUs for a torch without CUDA, and operators in CUDA C++ for them.

    Raises:
        RuntimeError: there can be none here, or the compiler fails; the text says why.
    """
    if reason := why_no_emulated_gpu():
        raise RuntimeError(reason)
    torch_folder = Path(torch.__file__).parent
    common = [
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "-pthread",
        "-isystem",
        TORCH_HEADERS,
    ]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    sources = ROOT / "tests/kernels/emulation"
    api = ["-isystem", f"{TORCH_HEADERS}/torch/csrc/api/include", "-DAT_PER_OPERATOR_HEADERS"]
    operators = [f"-DCOREAI_EMULATED_THREADS={threads}", "-DCOREAI_EMULATED_DEVICES", *defines]
    operators += [
        *includes(folder),
        f"-I{ROOT / 'tests/kernels'}",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    ]
    for name, source, flags in (
        ("gpu", "gpu.cpp", api),
        ("operators", "observe_and_fake_quantize.cpp", operators),
    ):
        command = [str(COMPILER), *common, *flags, str(sources / source), "-o", str(folder / f"{name}.so")]
        result = subprocess.run([*command, *libraries], capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{COMPILER} failed: {result.stderr[-3000:]}")


def why_no_emulated_gpu() -> str:
    """Why there can be no emulated GPU; empty if there can be."""
    if torch.version.cuda or torch.version.hip:
        return f"torch {torch.__version__} has GPUs of its own: emulated ones need a build of it for CPUs"
    if sys.platform != "linux":
        return "GPUs are emulated on Linux only"
    return "" if COMPILER else "no C++ compiler was found (Debian: apt install g++)"


def environment_of_emulated_gpu(folder: Path) -> dict[str, str]:
    """The environment of a process that imports ``emulated_gpu``."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "COREAI_EMULATED_GPU": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    for name in ("COREAI_KERNELS_BACKEND", "COREAI_FAST_PATH"):
        environment.pop(name, None)
    return environment


def pytest_on_emulated_gpu(file: Path, folder: Path) -> None:
    """Run a file of tests in a process with two emulated GPUs."""
    if reason := why_no_emulated_gpu():
        pytest.skip(reason)
    build_emulated_gpu(folder)
    # Before pytest loads what imports the operators.
    code = "import sys, tests.kernels.emulated_gpu, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=short"]
    result = subprocess.run(
        [sys.executable, "-c", code, *options, str(file)],
        cwd=ROOT,
        env=environment_of_emulated_gpu(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def behind(x: Tensor, elements: int) -> Tensor:
    """The same values in dense memory of the same order, so many elements behind 16 bytes' alignment."""
    memory = torch.zeros(x.numel() + elements + 16, dtype=x.dtype)
    first = elements + -memory.data_ptr() % 16 // x.element_size()
    order = memory_order(x)
    flat = memory[first : first + x.numel()]
    flat.copy_(x.permute(order).reshape(-1))
    return flat.view([x.size(i) for i in order]).permute([order.index(i) for i in range(x.dim())])


@dataclass(frozen=True)
class Compiled:
    """What nvcc made of a source.

    Attributes:
        kernels: how many there are of each architecture.
        registers: the most that a thread of each takes, in no order.
        ptx: by the kernel's name.
    """

    kernels: int
    registers: list[int]
    ptx: dict[str, str]


def compiled(source: Path, folder: Path) -> Compiled:
    """Compile for all architectures, and check that no kernel spills or has memory of a thread's own."""
    command = [str(NVCC), "-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", *includes(folder), "-isystem", TORCH_HEADERS]
    # PTX of the oldest, assembled for each: nothing in the source depends on the generation.
    codes = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
    command.append(f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{codes}]")
    command += ["-c", str(source), "-o", str(folder / "kernels.o"), "-Xptxas", "-v"]
    command += ["--keep", "--keep-dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-3000:]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert set(frames) == {("0", "0", "0")}
    assert "lmem" not in report
    (path,) = folder.glob("*.ptx")
    text = path.read_text()
    assert ".local" not in text
    entries = {entry[: entry.index("(")]: entry for entry in text.split(".entry ")[1:]}
    assert len(frames) == len(entries) * len(ARCHITECTURES)
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", report)]
    return Compiled(len(entries), registers, entries)
