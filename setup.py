"""The requirements of coreai-opt-fused; everything else about the distribution is in pyproject.toml.

The engine is a distribution of its own, coreai-kernels. ``pip install .`` in a checkout installs the one of
this checkout along with this one; a source distribution or a wheel that is passed on names its version.

Environment:
    COREAI_BUILD_ENGINE    checkout (default in a checkout: require the engine in its folder),
                           version (default elsewhere: require its version, however it gets there)

``python setup.py build_ext --inplace`` builds the engine's native parts in place, like ``kernels/setup.py``.
"""

import os
import runpy
import sys
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
KERNELS = HERE / "kernels"


def engine() -> str:
    """Return the requirement of the engine."""
    version = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]
    is_checkout = (KERNELS / "setup.py").exists()
    source = os.environ.get("COREAI_BUILD_ENGINE") or ("checkout" if is_checkout else "version")
    if source == "version":
        return f"coreai-kernels=={version}"
    if source != "checkout" or not is_checkout:
        raise SystemExit(f"COREAI_BUILD_ENGINE={source}: use version, or checkout where {KERNELS} is")
    return f"coreai-kernels @ {KERNELS.as_uri()}"


if "build_ext" in sys.argv:
    os.chdir(KERNELS)
    runpy.run_path(str(KERNELS / "setup.py"), run_name="__main__")
else:
    setup(
        install_requires=[
            engine(),
            "numpy",
            "pydantic>=2",
            "PyYAML",
            "rich",
            "safetensors",
            "torch>=2.10",
            "torchao",
            "tqdm",
        ]
    )
