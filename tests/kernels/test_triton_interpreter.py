"""Runs ``triton_interpreted.py``: all Triton operators under the interpreter, in processes of their own.

Of their own because TRITON_INTERPRET decides at triton's import how every kernel of the process is built, and
other tests compile kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


if release(triton.__version__) < (3, 7) and release(numpy.__version__) >= (2, 4):
    reason = "the interpreter of Triton 3.6 cannot run a loop with NumPy 2.4: int() of a one-element array"
    pytest.skip(reason, allow_module_level=True)

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")
PALETTES = Path(__file__).with_name("triton_palettes_interpreted.py")
_ELEMENTS = "test_fake_quantize or test_quantize or test_bits or test_64 or test_masks"
_STEPS = "test_observe_and_fake_quantize or test_tensor_in_parts"
PARTS = {
    "elements": (INTERPRETED, _ELEMENTS),
    "steps": (INTERPRETED, _STEPS),
    "others": (INTERPRETED, f"not ({_ELEMENTS} or {_STEPS})"),
    "palettes": (PALETTES, ""),
}


@pytest.mark.parametrize("part", PARTS)
def test_under_the_interpreter(part: str) -> None:
    file, selection = PARTS[part]
    root = INTERPRETED.parents[2]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("COREAI_KERNELS_BACKEND", None)
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", selection]
        + ["--no-header", "-x", "--tb=short", str(file)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
