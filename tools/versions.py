"""What the project supports: torch's minor versions, each by one release, and CPythons."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def minor(version: str) -> str:
    """``"2.13"`` of ``"2.13.0"``."""
    return ".".join(version.split(".")[:2])


def find_python(version: str) -> Path | None:
    """Return the interpreter of a version, on PATH, of pyenv or in a manylinux image, or None."""
    digits = version.replace(".", "")
    candidates = [
        shutil.which(f"python{version}"),
        *Path("/opt/python").glob(f"cp{digits}-cp{digits}/bin/python"),
        *Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python"),
    ]
    for candidate in filter(None, candidates):
        try:  # pyenv puts a script on PATH for each version, which runs only if that version is switched on
            found = ask(Path(candidate), "import sys; print('%d.%d' % sys.version_info[:2])")
        except (OSError, subprocess.CalledProcessError):
            continue
        if found == version:
            return Path(candidate)
    return None


def ask(python: Path, code: str) -> str:
    """Return what an interpreter prints."""
    command = [str(python), "-c", code]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout.strip()


def find_wheels() -> list[Path]:
    """Return the wheels of both distributions for this machine, the newest in ``dist``."""
    arch = platform.machine()
    found = []
    for pattern in ("coreai_opt_fused-*-any.whl", f"coreai_kernels-*{arch}.whl"):
        wheels = sorted((ROOT / "dist").glob(pattern), key=lambda path: path.stat().st_mtime)
        if not wheels:
            raise SystemExit(f"dist has no {pattern}: python tools/wheels.py builds one")
        found.append(wheels[-1])
    return found
