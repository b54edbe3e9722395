"""Runs the fast tests beside every torch and Python that is supported, and prints a table.

    python tools/matrix.py                                       # everything; about 30 GB of downloads
    python tools/matrix.py --torch 2.10.0 2.15.0 --python 3.11   # these

Tested are the wheels in ``dist`` (``make wheels``). Each Python gets an environment with their requirements,
each cell a folder with torch, which is removed afterwards. PyPI has CUDA builds for Linux: they are
installed without what they require of CUDA, and libraries of those names let them be imported, in which every
function answers "no device". With ``--pip-flags "--index-url https://download.pytorch.org/whl/cpu"`` they are
CPU builds, which need no such thing.

What the tests said is in ``build/matrix``, with earlier results of cells that are left out.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from versions import PYTHONS, ROOT, TORCHES, find_python, find_wheels, minor

WORK = ROOT / "build/matrix"
RESULTS = WORK / "results.json"
# Of torch, of this project, and of the tests; torch, torchao and what torch has for GPUs apart.
REQUIREMENTS = (
    *("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools"),
    *("numpy", "pydantic>=2", "PyYAML", "rich", "safetensors", "tqdm"),
    *("pytest", "pytest-xdist", "hypothesis"),
)
TORCHAO = "torchao==0.18.0"


def main() -> None:
    parser = argparse.ArgumentParser(description="the fast tests beside torches and Pythons")
    parser.add_argument("--torch", nargs="+", default=TORCHES)
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--tests", nargs="+", default=fast_tests(), help="default: those of make test-fast")
    parser.add_argument("--pytest-flags", default="-n 2 --dist worksteal")
    parser.add_argument("--pip-flags", default="", help="for torch")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wheels = find_wheels()
    for python in options.python:
        for torch in options.torch:
            cell = f"{python} {minor(torch)}"
            results[cell] = test(python, torch, wheels, options)
            print(f"Python {python}, torch {torch}: {results[cell]}", flush=True)
            WORK.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict[str, str]) -> str:
    lines = ["| Python | " + " | ".join(f"torch {minor(torch)}" for torch in TORCHES) + " |"]
    lines.append("| --- |" + " --- |" * len(TORCHES))
    for python in PYTHONS:
        cells = [results.get(f"{python} {minor(torch)}", "not run") for torch in TORCHES]
        lines.append(f"| {python} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fast_tests() -> list[str]:
    """Return the files of ``make test-fast``."""
    command = ["make", "-s", "--no-print-directory", "-C", str(ROOT), "print-fast-tests"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def test(python: str, torch: str, wheels: list[Path], options: argparse.Namespace) -> str:
    """Return what the tests said, or why they do not run here."""
    library = f"_C_autograd-torch{minor(torch)}-cp{python.replace('.', '')}.so"
    with zipfile.ZipFile(wheels[1]) as archive:
        if not any(name.endswith(library) for name in archive.namelist()):
            return "not in the wheel"
    interpreter = find_python(python)
    if interpreter is None:
        return "no interpreter here"
    environment = WORK / f"python{python}"
    folder = WORK / f"torch{torch}-python{python}"
    log = WORK / f"{folder.name}.txt"
    try:
        make_environment(interpreter, environment, wheels)
        pip(environment, "--no-deps", "--target", str(folder), *options.pip_flags.split(), f"torch=={torch}")
        variables = os.environ | {"PYTHONPATH": str(folder), "CI": "true", "OMP_NUM_THREADS": "1"}
        if missing := missing_libraries(folder / "torch/lib"):
            make_stand_ins(folder / "torch/lib", folder / "stand-ins", missing)
            variables["LD_LIBRARY_PATH"] = str(folder / "stand-ins")
        # Not in the repository, where the packages would be its own.
        run = folder / "run"
        shutil.copytree(ROOT / "tests", run / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", run)
        flags = ["-q", "-p", "no:cacheprovider", *options.pytest_flags.split(), "-m", "not slow"]
        command = [str(environment / "bin/python"), "-m", "pytest", *flags, *options.tests]
        done = subprocess.run(command, cwd=run, env=variables, capture_output=True, text=True)
        log.write_text(done.stdout + done.stderr)
        return summary(done.stdout, done.stderr)
    except subprocess.CalledProcessError as error:
        log.write_text(f"{error}\n{error.stdout}\n{error.stderr}")
        return f"not installed: {(error.stderr or str(error)).strip().splitlines()[-1][:200]}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def summary(output: str, errors: str) -> str:
    counts = re.findall(r"(\d+) (passed|failed|errors?)\b", (output.strip().splitlines() or [""])[-1])
    if not counts:
        lines = (errors.strip() or output.strip() or "nothing printed").splitlines()
        return f"does not run: {lines[-1][:200]}"
    return ", ".join(f"{number} {what}" for number, what in counts)


def make_environment(interpreter: Path, folder: Path, wheels: list[Path]) -> None:
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [str(interpreter), "-m", "venv", "--without-pip", str(folder)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        pip(folder, *REQUIREMENTS)
        pip(folder, "--no-deps", TORCHAO)
        (folder / "made").touch()
    pip(folder, "--no-deps", "--force-reinstall", *map(str, wheels))


def pip(environment: Path, *arguments: str) -> None:
    """Install with this Python's pip: the environment has none."""
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    command += ["--disable-pip-version-check", "install", "-q", *arguments]
    subprocess.run(
        command, check=True, env=os.environ | {"PIP_CONSTRAINT": ""}, capture_output=True, text=True
    )


def missing_libraries(folder: Path) -> set[str]:
    """Return the names of libraries that torch's need and this machine lacks."""
    missing = set()
    for library in folder.glob("*.so*"):
        lines = _read(["ldd", str(library)])
        missing |= {line.split()[0] for line in lines if line.endswith("not found")}
    return missing


def make_stand_ins(libraries: Path, folder: Path, missing: set[str]) -> None:
    """Make libraries of these names with the symbols, and their versions, that torch's libraries lack."""
    folder.mkdir()
    wanted: dict[str, dict[str, set[str]]] = {name: {} for name in missing}  # library, version, symbols
    undefined: set[str] = set()
    defined: set[str] = set()
    for library in libraries.glob("*.so*"):
        owner_of = versions_needed(library)
        for line in _read(["readelf", "--dyn-syms", "-W", str(library)]):
            fields = line.split()
            if len(fields) < 8 or fields[4] not in ("GLOBAL", "WEAK"):
                continue
            symbol, _, version = fields[7].partition("@")
            version = version.lstrip("@")
            if fields[6] != "UND":
                defined.add(symbol)
            elif version in owner_of and owner_of[version] in missing:
                wanted[owner_of[version]].setdefault(version, set()).add(symbol)
            elif not version and fields[4] == "GLOBAL" and not symbol.startswith(("Py", "_Py")):
                undefined.add(symbol)
    wanted[min(missing)].setdefault("", set()).update(undefined - defined)
    for name, versions in wanted.items():
        make_stand_in(folder / name, versions)


def versions_needed(library: Path) -> dict[str, str]:
    """Return the library that each version of a symbol comes from."""
    owner, owner_of = "", {}
    for line in _read(["readelf", "-V", "-W", str(library)]):
        if match := re.search(r"File: (\S+)", line):
            owner = match[1]
        elif owner and (match := re.search(r"Name: (\S+)\s+Flags", line)):
            owner_of[match[1]] = owner
    return owner_of


def make_stand_in(path: Path, versions: dict[str, set[str]]) -> None:
    # 100 is "no device" for CUDA's runtime and driver.
    answer = "mov w0, #100" if os.uname().machine == "aarch64" else "mov $100, %eax"
    source, script = path.with_suffix(".s"), path.with_suffix(".map")
    symbols = sorted(set().union(*versions.values()))
    source.write_text(
        # Without the note the stack would be executable, which newer C libraries refuse.
        '.section .note.GNU-stack,"",%progbits\n.text\n'
        + "".join(
            f".globl {symbol}\n.type {symbol}, %function\n{symbol}: {answer}\n ret\n" for symbol in symbols
        )
    )
    nodes = [
        f"{version} {{ global: {' '.join(f'{symbol};' for symbol in sorted(names))} }};"
        for version, names in versions.items()
        if version
    ]
    script.write_text("\n".join(nodes) + "\n")
    flags = [f"-Wl,--version-script={script}"] if nodes else []
    command = ["cc", "-shared", "-nostdlib", f"-Wl,-soname,{path.name}", *flags, str(source), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _read(command: list[str]) -> list[str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return done.stdout.splitlines()


if __name__ == "__main__":
    main()
