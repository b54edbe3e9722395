"""Installs the wheels into a fresh environment as a user does, and trains one step; says how long each took.

    python tools/try_wheel.py                      # those of dist, with this Python
    python tools/try_wheel.py --torch torch==2.14.1 --python python3.12

Torch is installed first, since its size is not this project's; everything else that the wheels require
counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from versions import find_wheels

STEP = """
import json, torch, coreai_opt
from coreai_kernels import native
from coreai_kernels.runtime import fast_path_counts
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
inputs, labels = torch.randn(256, 64), torch.randint(10, (256,))
model, quantizer = coreai_opt.quantize(model, inputs, "w4")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with quantizer.training_mode():
    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
parts = {"kernels": native.missing, "fast path": native.autograd_missing}
facts = {part: str(missing or "compiled") for part, missing in parts.items()}
print(json.dumps(facts | {"loss is finite": bool(loss.isfinite())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="install the wheels and train a step")
    parser.add_argument("--wheels", nargs="+", type=Path, help="default: those in dist for this machine")
    parser.add_argument("--torch", default="torch", help="what pip installs first")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--pip-flags", default="")
    options = parser.parse_args()
    wheels = options.wheels or find_wheels()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([options.python, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin/python"
        install = [
            python,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-q",
            *options.pip_flags.split(),
        ]
        subprocess.run([*install, options.torch], check=True)
        installed, _ = timed([*install, *wheels], folder)
        stepped, output = timed([python, "-c", STEP], folder)
    facts = json.loads(output.splitlines()[-1])
    names = " and ".join(wheel.name for wheel in wheels)
    print(f"{names}: pip install {installed:.1f} s, import and first step {stepped:.1f} s; {facts}")
    if facts != {"kernels": "compiled", "fast path": "compiled", "loss is finite": True}:
        raise SystemExit("the installation lacks a compiled part")


def timed(command: list[object], folder: str) -> tuple[float, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.perf_counter()
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - began, result.stdout


if __name__ == "__main__":
    main()
