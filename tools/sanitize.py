"""Runs tests on a native library with AddressSanitizer and UBSan, beside torch: ``python tools/sanitize.py``.

Operators, autograd's library and generic kernels are compiled into ``build/sanitize/library``, with a copy of
the engine's Python files; the tests are those below or those that the command line names. GCC on Linux. What
a sanitizer reports ends the run. Leaks are not looked for: Python keeps much until a process ends.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/sanitize/library"
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
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

_BEYOND = """
import torch, coreai_kernels
x = torch.zeros(1000)
x.untyped_storage().resize_(64)
coreai_kernels.observe_range(x, block_size=(1000,))
"""


def main() -> int:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    environment = os.environ.copy()  # tests compile, too: without sanitizers
    build(compiler)
    environment |= settings(compiler, environment)
    require_reports(environment)
    # What a sanitizer writes before it ends the process has to reach the terminal.
    command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *(sys.argv[1:] or TESTS)], env=environment, cwd=ROOT, check=False)
    return done.returncode


def build(compiler: list[str]) -> None:
    """Compile what is out of date, as kernels/setup.py does it but for the flags."""
    os.environ |= {"CXX": shlex.join([*compiler, *FLAGS]), "COREAI_BUILD_NATIVE": "require"}
    setup = _setup()
    # Checks make optimised code several times as large, and compiling it takes many minutes: kernels of other
    # instruction sets are run by .ci/sanitize, by themselves.
    others = {name: flags for sets in setup.ISAS.values() for name, flags in sets.items()}
    setup.ISAS |= {architecture: {"generic": []} for architecture in setup.ISAS} | {"left out": others}
    setup.CXX_FLAGS[:] = ["-O1" if flag == "-O3" else flag for flag in setup.CXX_FLAGS] + ["-g1"]
    package = FOLDER / "coreai_kernels"
    built = shutil.ignore_patterns("_C*", "_build*", "__pycache__")
    shutil.copytree(ROOT / "kernels/coreai_kernels", package, dirs_exist_ok=True, ignore=built)
    report = setup.build_all(FOLDER / "objects", package / "_C.abi3.so", in_place=False)
    (package / "_build_report.json").write_text(json.dumps(report))


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coreai_kernels_setup", ROOT / "kernels/setup.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def settings(compiler: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Return the variables with which Python runs on the library."""
    # The C++ library is loaded first, too: what it throws is only seen by a sanitizer that finds it loaded.
    preloaded = [_library(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    return {
        "LD_PRELOAD": " ".join(preloaded),
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(ROOT), environment.get("PYTHONPATH", "")]),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CI": "1",  # hypothesis draws the same cases each time
    }


def require_reports(environment: dict[str, str]) -> None:
    """SystemExit unless an operator that reads beyond its tensor's memory is reported."""
    command = [sys.executable, "-W", "ignore", "-c", _BEYOND]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    if "heap-buffer-overflow" not in done.stderr:
        raise SystemExit(f"the sanitizer does not see a read beyond memory: {done.stdout}{done.stderr}")


def _library(compiler: list[str], name: str) -> str:
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{shlex.join(compiler)} has no {name}")
    return path


if __name__ == "__main__":
    sys.exit(main())
