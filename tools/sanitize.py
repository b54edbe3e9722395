"""Runs tests on a native library with sanitizers, beside torch: ``python tools/sanitize.py [--threads]``.

AddressSanitizer and UBSan, or with ``--threads`` ThreadSanitizer on four threads. Operators, autograd's
library and generic kernels are compiled into a folder of ``build/sanitize``, with a copy of the engine's
Python files; the tests are those below or those that the command line names. GCC on Linux. What a sanitizer
reports ends the run. Leaks are not looked for: Python keeps much until a process ends.

Torch's OpenMP is not compiled for ThreadSanitizer, which would report each parallel region. LLVM's takes its
place, which has the same functions, with Archer, which tells the sanitizer where threads of OpenMP wait for
each other. Debian: ``apt install libomp-14-dev``.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# Operators, their gradients, lists of tensors, and captured calls.
_KERNELS = (
    *("operators", "straight_through", "foreach", "backends_agree", "columns", "masks", "sampled_mask"),
    *(
        "palettize",
        "soft_palettize",
        "lookup",
        "kmeans",
        "kmeans_1d",
        "learnable_range",
        "gptq_columns",
        "by_reciprocal",
    ),
)
_SIMULATORS = ("fast_path", "fake_quantize", "subclasses")
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in _KERNELS),
    *(f"tests/coreai_opt/quantization/spec/test_{name}.py" for name in _SIMULATORS),
]
_IN_THREADS = [
    "tests/kernels/test_threads.py",
    "tests/test_faults.py::test_models_in_threads_of_their_own",
    "tests/test_faults.py::test_one_model_in_several_threads",
]

_BEYOND = """
import torch, coreai_kernels
x = torch.zeros(1000)
x.untyped_storage().resize_(64)
coreai_kernels.observe_range(x, block_size=(1000,))
"""
# Scales of the second half of the rows lie where minima of the first half do.
_RACE = """
import torch, coreai_kernels
torch.set_num_threads(4)
rows = 4000
shared = torch.zeros(rows + rows // 2, 1)
coreai_kernels.observe_and_fake_quantize(
    torch.randn(rows, 64), scale=shared[:rows], zero_point=torch.zeros(rows, 1, dtype=torch.int32),
    minval=shared[rows // 2 :], block_size=(1, 64), scheme=coreai_kernels.Scheme.ASYMMETRIC,
    quant_min=-8, quant_max=7)
"""
_PYTEST = """
import sys, pytest, torch
torch.set_num_threads(int(sys.argv[1]))
sys.exit(pytest.main(sys.argv[2:]))
"""


@dataclass(frozen=True)
class Sanitizer:
    """What is compiled and run with it, and a mistake that it has to report."""

    folder: Path
    flags: tuple[str, ...]
    library: str
    settings: dict[str, str]
    threads: int
    tests: list[str]
    mistake: str
    report: str


ADDRESS = Sanitizer(
    folder=ROOT / "build/sanitize/library",
    flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    library="libasan.so",
    settings={
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    threads=2,
    tests=TESTS,
    mistake=_BEYOND,
    report="heap-buffer-overflow",
)
THREADS = Sanitizer(
    folder=ROOT / "build/sanitize/threads-library",
    flags=("-fsanitize=thread", "-fno-omit-frame-pointer", "-DCOREAI_PARALLEL_ELEMENTS=64"),
    library="libtsan.so",
    # Python and torch are not compiled for it: their memory is left alone, their locks are not.
    settings={"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"},
    threads=4,
    tests=[*TESTS, *_IN_THREADS],
    mistake=_RACE,
    report="ThreadSanitizer: data race",
)


def main() -> int:
    parser = argparse.ArgumentParser(description="tests on a native library with sanitizers")
    parser.add_argument("--threads", action="store_true", help="ThreadSanitizer, instead of AddressSanitizer")
    parser.add_argument("tests", nargs="*", help="what pytest takes; by default the tests of operators")
    options = parser.parse_args()
    chosen = THREADS if options.threads else ADDRESS
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    environment = os.environ.copy()  # tests compile, too: without sanitizers
    build(compiler, chosen)
    environment |= settings(compiler, environment, chosen)
    require_reports(environment, chosen)
    # What a sanitizer writes before it ends the process has to reach the terminal.
    command = [sys.executable, "-c", _PYTEST, str(chosen.threads)]
    command += ["-q", "--capture=sys", "-p", "no:cacheprovider", *(options.tests or chosen.tests)]
    return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode


def build(compiler: list[str], chosen: Sanitizer) -> None:
    """Compile what is out of date, as kernels/setup.py does it but for the flags."""
    os.environ |= {"CXX": shlex.join([*compiler, *chosen.flags]), "COREAI_BUILD_NATIVE": "require"}
    setup = _setup()
    # Checks make optimised code several times as large, and compiling it takes many minutes: kernels of other
    # instruction sets are run by .ci/sanitize, by themselves.
    others = {name: flags for sets in setup.ISAS.values() for name, flags in sets.items()}
    setup.ISAS |= {architecture: {"generic": []} for architecture in setup.ISAS} | {"left out": others}
    setup.CXX_FLAGS[:] = ["-O1" if flag == "-O3" else flag for flag in setup.CXX_FLAGS] + ["-g1"]
    package = chosen.folder / "coreai_kernels"
    built = shutil.ignore_patterns("_C*", "_build*", "__pycache__")
    shutil.copytree(ROOT / "kernels/coreai_kernels", package, dirs_exist_ok=True, ignore=built)
    report = setup.build_all(chosen.folder / "objects", package / "_C.abi3.so", in_place=False)
    (package / "_build_report.json").write_text(json.dumps(report))


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coreai_kernels_setup", ROOT / "kernels/setup.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def settings(compiler: list[str], environment: dict[str, str], chosen: Sanitizer) -> dict[str, str]:
    """Return the variables with which Python runs on the library."""
    # The C++ library is loaded first, too: what it throws is only seen by a sanitizer that finds it loaded.
    preloaded = [_library(compiler, name) for name in (chosen.library, "libstdc++.so.6")]
    more = dict(chosen.settings)
    if chosen is THREADS:
        archer = _archer()
        preloaded.append(str(archer.with_name("libomp.so.5")))
        more["OMP_TOOL_LIBRARIES"] = str(archer)
    return more | {
        "LD_PRELOAD": " ".join(preloaded),
        "PYTHONPATH": os.pathsep.join([str(chosen.folder), str(ROOT), environment.get("PYTHONPATH", "")]),
        "CI": "1",  # hypothesis draws the same cases each time
    }


def _archer() -> Path:
    """Return LLVM's library that knows what OpenMP's threads wait for, which lies beside LLVM's OpenMP."""
    found = list(Path("/usr/lib").glob("llvm-*/lib/libarcher.so"))
    if not found:
        raise SystemExit("ThreadSanitizer beside torch needs LLVM's OpenMP: apt install libomp-14-dev")
    return max(found, key=lambda path: int(path.parts[3].removeprefix("llvm-")))


def require_reports(environment: dict[str, str], chosen: Sanitizer) -> None:
    """SystemExit unless a mistake made on purpose is reported."""
    command = [sys.executable, "-W", "ignore", "-c", chosen.mistake]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    if chosen.report not in done.stderr:
        raise SystemExit(f"the sanitizer does not see a mistake: {done.stdout}{done.stderr}")


def _library(compiler: list[str], name: str) -> str:
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{shlex.join(compiler)} has no {name}")
    return path


if __name__ == "__main__":
    sys.exit(main())
