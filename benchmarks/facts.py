"""The machine and the versions that a result belongs to."""

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coreai_kernels import native

__all__ = ["machine_facts", "save_rows"]


def machine_facts() -> dict[str, Any]:
    """Facts for a result's file."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": native.extension.cpu_capability() if native.extension else "none: no native extension",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save_rows(path: Path, module: str, argv: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a run of ``python -m module argv`` as JSON: machine, command and results."""
    command = shlex.join(["python", "-m", module, *argv])
    result = {"machine": machine_facts(), "command": command, "results": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
