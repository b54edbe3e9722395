"""Builds the native parts with the builder at the root of the repository."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup

_spec = importlib.util.spec_from_file_location(
    "coreai_build", Path(__file__).resolve().parents[1] / "setup.py"
)
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)

_module = Extension("coreai_kernels._C", ["../csrc/bindings.cpp"], optional=True, py_limited_api=True)
setup(ext_modules=[_module], cmdclass={"build_ext": _build.BuildNative})
