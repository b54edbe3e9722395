"""Builds the native parts of coreai_kernels; everything else about the distribution is in pyproject.toml.

Made here, in ``coreai_kernels``: ``_C.abi3.so`` (a Python module: CPU kernels, for every CPython from 3.11
and every torch from 2.10 on; without a GIL, for this CPython alone), ``_C_cuda.so`` (a plain library, loaded
only beside a CUDA torch, since a CPU-only torch lacks the symbols that it needs),
``_C_autograd-torch2.13-cp311.so`` (a Python module, loaded only beside the torch and the Python that it was
built for; a wheel has several), and ``_build_report.json``, which tells the library at run time what is
missing and why.

Why not torch's own extension builder: it gives all sources the same flags, and here each instruction
set has its own; and importing torch costs more than an incremental build. Why not ninja: for a dozen files,
nearly all of which need only the stable headers, a thread pool is as quick, and building takes one tool less.

Environment:
    CXX                      C++20 compiler (default: the first of c++, g++, clang++; by ccache if there)
    MAX_JOBS                 compilers run at the same time (default: number of CPUs)
    COREAI_BUILD_NATIVE      auto (default: a failure is recorded and the pure Python package is installed),
                             require (a failure is an error), skip
    COREAI_BUILD_CUDA        1 or 0 (default: 1 if the installed torch is a CUDA build)
    COREAI_AUTOGRAD_TORCHES  folders of other torches, of which version.py and include suffice, with colons
                             between them: autograd's library is built for each, not for the installed one
    COREAI_AUTOGRAD_PYTHONS  include folders of CPythons, likewise: and for each of these
    TORCH_CUDA_ARCH_LIST     as for torch, e.g. "8.0;9.0+PTX" (default: of 8.0;9.0;10.0+PTX what nvcc knows);
                             what is older than 8.0 is left out
"""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
# A source distribution holds the C++ sources beside this file, the repository beside this file's folder.
CSRC = HERE / "csrc" if (HERE / "csrc").is_dir() else HERE.parent / "csrc"
FORMATS = HERE / "coreai_kernels/formats.py"
LIBRARIES = runpy.run_path(str(HERE / "coreai_kernels/libraries.py"))
REPORT = "_build_report.json"
CUDA_LIBRARY = "_C_cuda.so"
OLDEST_GPU = 80  # that the kernels in CUDA C++ are for
REINSTALL = LIBRARIES["REINSTALL"]

# The stable ABI of this torch version: the binary runs with it and everything newer.
TARGET_VERSION = "0x020a000000000000ULL"
MINIMUM_TORCH = (2, 10)

# No fast-math and no contraction: NaN, infinities and every rounding are part of the results.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# Of torch's operators that code calls one: without this, headers of all 2,000 are read.
AUTOGRAD_FLAGS = ["-DAT_PER_OPERATOR_HEADERS"]
STABLE_ABI = f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"
NVCC_FLAGS = (
    "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden --fmad=false --expt-relaxed-constexpr "
    f"-DUSE_CUDA {STABLE_ABI}"
).split()

# Of each architecture, as compilers name it: instruction sets and their flags, each with those before it.
# The order matters when linking, too: of an inline function that several files emit the linker keeps the
# first, so the copy kept never needs more than its users have.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_X86 = {
    "generic": [],
    "avx2": _AVX2,
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2],
}
_ARM: dict[str, list[str]] = {"generic": [], "neon": []}
ISAS: dict[str, dict[str, list[str]]] = {"x86_64": _X86, "i686": _X86, "aarch64": _ARM, "arm64": _ARM}


class BuildError(Exception):
    """What stops a native part from being built, and what the user can do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> "Torch":
        """Read the installed torch's facts without importing it, which takes seconds."""
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BuildError(
                "torch was not there when the package was built (isolated builds hide it)",
                f"pip install 'torch>=2.10', then {REINSTALL}",
            )
        return cls.at(Path(spec.origin).parent)

    @classmethod
    def at(cls, root: Path) -> "Torch":
        """Read the facts of the torch in a folder."""
        text = (root / "version.py").read_text()
        version = _quoted(r"__version__", text) or "unknown"
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if numbers < MINIMUM_TORCH:
            raise BuildError(f"torch {version} is too old", f"pip install 'torch>=2.10', then {REINSTALL}")
        return cls(root, version, _quoted(r"cuda(?:: Optional\[str\])?", text))


def _quoted(name: str, text: str) -> str | None:
    match = re.search(rf"^{name}\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


@dataclass(frozen=True)
class Job:
    """One source and the command that compiles it, all but the output's name."""

    source: Path
    command: tuple[str, ...]
    name: str
    headers: str = (
        ""  # what the compiler's list of dependencies leaves out: system headers, by their versions
    )


class Builder:
    """Compiles what is out of date and links it."""

    def __init__(self, directory: Path, torch: Torch, in_place: bool) -> None:
        self.directory, self.torch = directory, torch
        self.cxx = _compiler()
        self.compiler = [*_cache(self.cxx), *self.cxx]
        # Part of each object's name: another torch, Python or compiler makes other objects.
        version = _output([*self.cxx, "--version"])
        self.identity = [torch.version, sys.version, version]
        # GCC takes its own AVX-512 intrinsics for reads of uninitialised variables (its bug 105593).
        self.quiet = [] if "clang" in version else ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        # What is compiled for, which need not be this machine: architecture, vendor and system.
        self.target = _output([*self.cxx, "-dumpmachine"]).strip()
        self.isas = ISAS.get(self.target.split("-")[0], {"generic": []})
        directory.mkdir(parents=True, exist_ok=True)
        self.pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
        self.started: dict[Job, Future[Path]] = {}
        self.seconds: dict[Job, float] = {}  # of processor time
        self.in_place = in_place
        self.generated = directory / "include"
        write_formats(self.generated / "common/formats.h")

    def own_includes(self) -> list[str]:
        return [f"-I{CSRC}", f"-I{self.generated}"]

    def includes(self, *systems: Path) -> list[str]:
        systems = systems or (self.torch.root / "include", Path(sysconfig.get_path("include")))
        return [*self.own_includes(), *(flag for path in systems for flag in ("-isystem", str(path)))]

    def link(self) -> list[str]:
        # No rpath: torch is imported first, so its libraries are loaded already, wherever they are.
        if "darwin" in self.target:
            return [*self.cxx, "-bundle", "-undefined", "dynamic_lookup"]
        return [*self.cxx, "-shared", "-pthread"]

    def jobs(self, sources: list[Path], command: list[str], units: int = 0, headers: str = "") -> list[Job]:
        """One job for each source; for so many units of them, if this build starts from nothing anyway.

        What torch's headers cost is paid once a unit. A build in place is one of many, where only what
        changed should be compiled.
        """
        if self.in_place or not units:
            return [
                Job(path, tuple(command), str(path.relative_to(CSRC.parent)), headers) for path in sources
            ]
        jobs = []
        for unit in range(min(units, len(sources))):
            members = sources[unit::units]
            folder, stems = members[0].parent.name, ",".join(path.stem for path in members)
            path = self.generated / f"{folder}-{unit}.cpp"
            _write(path, "".join(f'#include "{member.relative_to(CSRC)}"\n' for member in members))
            jobs.append(Job(path, tuple(command), f"csrc/{folder}/{{{stems}}}.cpp", headers))
        return jobs

    def start(self, jobs: list[Job]) -> None:
        """Compile these in this order, as processors are free; not what an earlier call has begun with."""
        for job in jobs:
            if job not in self.started:
                self.started[job] = self.pool.submit(self._compile, job)

    def build(self, jobs: list[Job], link: list[str], output: Path, *libraries: str) -> None:
        self.start(jobs)
        objects = [self.started[job].result() for job in jobs]
        command = [*link, *map(str, objects), *self._libraries([*libraries, "torch_cpu", "c10"])]
        stamp = self.directory / f"{output.name}.{_digest([*command, *self.identity])}"
        if output.exists() and stamp.exists() and _newer(stamp, objects) and _newer(output, objects):
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        _run([*command, "-o", f"{output}.new"], f"link {output.name}")
        os.replace(f"{output}.new", output)
        for other in self.directory.glob(f"{output.name}.*"):  # of what is overwritten
            other.unlink()
        stamp.touch()

    def _libraries(self, names: list[str]) -> list[str]:
        """Return the linker's flags for torch's libraries.

        What is linked records their names, by which the system finds them among those that are loaded. Empty
        libraries of these names do for that, so torch's own need not be of the architecture compiled for.
        """
        if "darwin" in self.target:
            return []  # undefined symbols are looked up in all that is loaded
        folder = self.directory / f"stand-ins-{_digest([self.target])}"
        folder.mkdir(exist_ok=True)
        for name in names:
            library = folder / f"lib{name}.so"
            if not library.exists():
                command = [*self.cxx, "-shared", f"-Wl,-soname,{library.name}", "-x", "c++", os.devnull]
                _run([*command, "-o", str(library)], f"stand-in for {library.name}")
        return [f"-L{folder}", "-Xlinker", "--no-as-needed", *(f"-l{name}" for name in names)]

    def _compile(self, job: Job) -> Path:
        stem = re.sub(r"\W+", "-", job.name.removeprefix("csrc/").removesuffix(".cpp"))
        target = self.directory / f"{stem}-{_digest([*job.command, job.headers, *self.identity])}.o"
        dependencies = target.with_suffix(".d")
        if target.exists() and dependencies.exists() and _newer(target, _read_dependencies(dependencies)):
            return target
        partial = target.with_suffix(".new.o")
        command = [*job.command, "-c", str(job.source), "-MMD", "-MF", str(dependencies), "-o", str(partial)]
        self.seconds[job] = _run(command, f"compile {job.name}")
        os.replace(partial, target)
        return target

    def close(self) -> None:
        """Start no more compilers, and say where the time went."""
        self.pool.shutdown(cancel_futures=True)
        if not self.seconds:
            return
        sources: dict[str, float] = {}  # autograd's are compiled once for each torch and Python
        for job, seconds in self.seconds.items():
            sources[job.name] = sources.get(job.name, 0) + seconds
        longest = sorted(sources.items(), key=lambda item: -item[1])[:8]
        text = ", ".join(f"{name.removeprefix('csrc/')} {seconds:.0f} s" for name, seconds in longest)
        total = sum(sources.values())
        _say(f"{total:.0f} s of processor time for {len(sources)} sources: {text}, ...")


def write_formats(path: Path) -> None:
    """Write the header of number formats from the table in ``formats.py``; not if it is there already."""
    _write(path, runpy.run_path(str(FORMATS))["native_header"]())


def _write(path: Path, text: str) -> None:
    """Write a file, unless it is like that: what is newer is compiled again."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _newer(target: Path, sources: list[Path]) -> bool:
    time = target.stat().st_mtime_ns
    return all(source.exists() and source.stat().st_mtime_ns <= time for source in sources)


def _read_dependencies(path: Path) -> list[Path]:
    text = path.read_text().replace("\\\n", " ").split(":", 1)[-1]
    return [Path(part.replace("\\ ", " ")) for part in re.findall(r"(?:\\ |\S)+", text)]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}", _COMPILER_FIX) from error


def _say(text: str) -> None:
    # One write: print's text and line end are two, and the compilers' threads come between them.
    sys.stdout.write(f"[coreai_kernels] {text}\n")
    sys.stdout.flush()


def _run(command: list[str], what: str) -> float:
    """Run a compiler or linker; return the processor time that it took, in seconds."""
    _say(what)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}", _COMPILER_FIX) from error
    with process.stdout as pipe:  # type: ignore[union-attr]
        output = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)  # unlike wait(), tells what it and its children have used
    process.returncode = os.waitstatus_to_exitcode(status)
    if output:
        _say(f"{what}:\n{output[:20_000]}")
    if process.returncode != 0:
        lines = [line for line in output.splitlines() if "error" in line.lower()] or [output[-300:]]
        _say(f"failed: {shlex.join(command)}")
        raise BuildError(
            f"{what} failed: {' | '.join(lines[:3])}",
            f"set CXX to a C++20 compiler (GCC 11 or Clang 14 at least), then {REINSTALL}",
        )
    return usage.ru_utime + usage.ru_stime


_COMPILER_FIX = f"install a C++20 compiler (Debian: apt install g++; or set CXX), then {REINSTALL}"


def _compiler() -> list[str]:
    if wanted := os.environ.get("CXX"):
        return shlex.split(wanted)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler was found", _COMPILER_FIX)


def _cache(cxx: list[str]) -> list[str]:
    """Return ccache, if it is there and the user has not chosen the compiler, perhaps with one before it."""
    ccache = shutil.which("ccache")
    if os.environ.get("CXX") or ccache is None or os.path.realpath(cxx[0]) == os.path.realpath(ccache):
        return []
    return [ccache]


def build_native(builder: Builder, output: Path, cuda_archs: str) -> None:
    known = {isa for isas in ISAS.values() for isa in isas}
    unknown = {path.stem for path in CSRC.glob("cpu/kernels_*.cpp")} - {f"kernels_{isa}" for isa in known}
    if unknown:
        raise BuildError(f"no flags are known for {sorted(unknown)}", "add them to ISAS in setup.py")
    present = {isa: CSRC / "cpu" / f"kernels_{isa}.cpp" for isa in builder.isas}
    macros = [f"-DCOREAI_HAVE_{isa.upper()}" for isa in present if isa != "generic"]
    facts = [
        f'-DCOREAI_ISAS="{" ".join(present)}"',
        f'-DCOREAI_TORCH_VERSION="{builder.torch.version}"',
        f'-DCOREAI_CUDA_ARCHS="{cuda_archs}"',
    ]
    base = [*builder.compiler, *CXX_FLAGS, STABLE_ABI, *builder.includes(), *macros]
    kernels = [
        job
        for isa, path in reversed(present.items())
        for job in builder.jobs([path], [*base, *builder.isas[isa], *builder.quiet])
    ]
    others = []
    for folder, units in (("ops", 2), ("common", 0), ("cpu", 0), ("cpu/*", 0)):
        sources = sorted(CSRC.glob(f"{folder}/*.cpp"))
        others += builder.jobs([path for path in sources if path.stem[:8] != "kernels_"], base, units)
    others += builder.jobs([CSRC / "bindings.cpp"], [*base, *facts])
    # The longest first: what is left for the end is short, and no processor waits for another.
    autograd = [autograd_jobs(builder, torch, include) for torch, _, include in autograd_targets(builder)]
    builder.start([*kernels, *itertools.chain(*autograd), *others])
    builder.build([*others, *reversed(kernels)], builder.link(), output)


def build_autograd(builder: Builder, folder: Path, torch: Torch, python: str, include: Path) -> Path:
    """Build the library of autograd nodes, the one part that needs more of torch than its stable ABI."""
    output = folder / LIBRARIES["autograd_library"](torch.version, python)
    builder.build(autograd_jobs(builder, torch, include), builder.link(), output, "torch_python")
    return output


def autograd_targets(builder: Builder) -> list[tuple[Torch, str, Path]]:
    """Return each torch, and each Python with its include folder, that autograd's library is built for."""
    torches = [Torch.at(Path(path)) for path in _paths("COREAI_AUTOGRAD_TORCHES")] or [builder.torch]
    pythons = [(_python_version(Path(path)), Path(path)) for path in _paths("COREAI_AUTOGRAD_PYTHONS")]
    pythons = pythons or [(LIBRARIES["PYTHON"], Path(sysconfig.get_path("include")))]
    return [(torch, *python) for python in pythons for torch in torches]


def _paths(variable: str) -> list[str]:
    return [path for path in os.environ.get(variable, "").split(os.pathsep) if path]


def _python_version(include: Path) -> str:
    header = include / "patchlevel.h"
    if not header.exists():
        raise BuildError(f"{include} has no headers of Python", "correct COREAI_AUTOGRAD_PYTHONS")
    numbers = dict(re.findall(r"#define PY_(MAJOR|MINOR)_VERSION\s+(\d+)", header.read_text()))
    configuration = include / "pyconfig.h"
    without_gil = configuration.exists() and "#define Py_GIL_DISABLED 1" in configuration.read_text()
    return f"{numbers['MAJOR']}.{numbers['MINOR']}" + "t" * without_gil


def autograd_jobs(builder: Builder, torch: Torch, python: Path) -> list[Job]:
    includes = builder.includes(torch.root / "include", python)
    command = [*builder.compiler, *CXX_FLAGS, *AUTOGRAD_FLAGS, *includes]
    sources = sorted(CSRC.glob("autograd/*.cpp"))
    return builder.jobs(sources, command, units=1, headers=f"torch {torch.version}")


def build_cuda(builder: Builder, output: Path) -> str:
    """Build the CUDA library; return the architectures in it."""
    sources = sorted(CSRC.glob("cuda/*.cu"))
    if not sources:
        raise BuildError("this version has no CUDA C++ sources", "nothing to do: GPUs are served by Triton")
    wish = os.environ.get("COREAI_BUILD_CUDA")
    if wish == "0":
        raise BuildError("switched off by COREAI_BUILD_CUDA=0", f"unset it, then {REINSTALL}")
    if wish != "1" and not builder.torch.cuda:
        raise BuildError(
            f"torch {builder.torch.version} is not a CUDA build",
            f"install a CUDA build of torch, then {REINSTALL}",
        )
    nvcc = shutil.which("nvcc") or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
    if nvcc is None:
        raise BuildError("nvcc was not found", f"install the CUDA toolkit or set CUDA_HOME, then {REINSTALL}")
    known = _output([nvcc, "--list-gpu-arch"]).split()
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"
    targets, archs = [], []
    for entry in re.split(r"[;\s]+", wanted.strip()):
        number = entry.removesuffix("+PTX").replace(".", "")
        if f"compute_{number}" not in known and not number.endswith(("a", "f")):
            _say(f"{nvcc} does not know architecture {entry}: left out")
            continue
        # Older ones lack bfloat16, and minima that NaN wins.
        if int(re.match(r"\d*", number)[0] or 0) < OLDEST_GPU:  # type: ignore[index]
            _say(f"architecture {entry} is too old and left out: COREAI_KERNELS_BACKEND=triton serves it")
            continue
        codes = [f"sm_{number}", *([f"compute_{number}"] if entry.endswith("+PTX") else [])]
        targets += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
        archs += codes
    if not archs:
        raise BuildError(
            f"of {wanted} there is no architecture that nvcc knows and the kernels are for",
            f"set TORCH_CUDA_ARCH_LIST to such of 8.0 and later, then {REINSTALL}",
        )
    command = [nvcc, "-ccbin", builder.cxx[0], *NVCC_FLAGS, *targets, *builder.own_includes()]
    command += ["-isystem", str(builder.torch.root / "include")]
    builder.build(builder.jobs(sources, command), [nvcc, "-shared"], output)
    return " ".join(archs)


class BuildNative(build_ext):
    """setuptools' place for extensions, with the builder above in place of its compiler driver."""

    def run(self) -> None:
        self.for_source_tree = bool(self.inplace)  # which setuptools turns off while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        report = build_all(Path(self.build_temp), output, self.for_source_tree)
        (output.parent / REPORT).write_text(json.dumps(report, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            target = Path(self.get_ext_fullpath(ext.name))
            # What an earlier build left, under other names perhaps, would be loaded instead.
            for stale in target.parent.glob("_C*.so"):
                if not (built.parent / stale.name).exists():
                    stale.unlink()
            for path in (*built.parent.glob("_C*.so"), built.parent / REPORT):
                self.copy_file(str(path), str(target.parent / path.name))


def build_all(directory: Path, output: Path, in_place: bool) -> dict[str, dict[str, object]]:
    """Build all parts into ``output``'s folder; the report says which exist and why others do not."""
    mode = os.environ.get("COREAI_BUILD_NATIVE") or "auto"
    if mode not in ("auto", "require", "skip"):
        raise SystemExit(f"COREAI_BUILD_NATIVE={mode}: use auto, require or skip")
    report: dict[str, dict[str, object]] = {}
    cuda_library = output.with_name(CUDA_LIBRARY)
    autograd_libraries: list[Path] = []
    builder, archs = None, ""
    try:
        if mode == "skip":
            raise BuildError("switched off by COREAI_BUILD_NATIVE=skip", f"unset it, then {REINSTALL}")
        if sys.platform == "win32":
            raise BuildError("native kernels are not built on Windows", "use Linux or macOS (WSL is Linux)")
        builder = Builder(directory.resolve() / "native", Torch.find(), in_place)
    except BuildError as error:
        report["native"] = report["cuda"] = report["autograd"] = _failure(error, mode)
    if builder is not None:
        try:
            try:
                archs = build_cuda(builder, cuda_library)
                report["cuda"] = {"built": True}
            except BuildError as error:
                report["cuda"] = _failure(error, "auto")
            try:
                build_native(builder, output, archs)
                report["native"] = {"built": True}
            except BuildError as error:
                report["native"] = _failure(error, mode)
            try:
                targets = autograd_targets(builder)
                autograd_libraries = [build_autograd(builder, output.parent, *target) for target in targets]
                report["autograd"] = {
                    "built": True,
                    "torch": list(dict.fromkeys(torch.version for torch, _, _ in targets)),
                    "python": list(dict.fromkeys(python for _, python, _ in targets)),
                }
            except BuildError as error:
                report["autograd"] = _failure(error, mode)
        finally:
            builder.close()
    made = {"native": [output], "cuda": [cuda_library], "autograd": autograd_libraries}
    fresh = [path for part, paths in made.items() for path in paths if report[part]["built"]]
    for path in output.parent.glob("_C*.so"):
        if path not in fresh:  # an earlier build left it, and it must not pass for this one's
            path.unlink()
    return report


def _failure(error: BuildError, mode: str) -> dict[str, object]:
    if mode == "require":
        raise SystemExit(f"[coreai_kernels] not built: {error.reason}\n  to fix: {error.fix}")
    _say(f"not built: {error.reason}\n  to fix: {error.fix}")
    return {"built": False, "reason": error.reason, "fix": error.fix}


class SourceDistribution(sdist):
    """With the C++ sources, which the repository keeps beside this folder."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(CSRC, Path(base_dir, "csrc"), dirs_exist_ok=True)


if __name__ == "__main__":
    setup(
        # The list of sources serves only to show setuptools that there is something to build.
        ext_modules=[
            Extension(
                "coreai_kernels._C",
                ["../csrc/bindings.cpp"],
                optional=True,
                py_limited_api=not LIBRARIES["FREE_THREADED"],
            )
        ],
        cmdclass={"build_ext": BuildNative, "sdist": SourceDistribution},
    )
