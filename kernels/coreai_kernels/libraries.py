"""Names of the compiled libraries, for the build and for :mod:`coreai_kernels.native`.

Imports nothing of the package: ``setup.py`` runs this file by itself.
"""

import re
import sys
import sysconfig

__all__ = ["FREE_THREADED", "MODULE", "PYTHON", "REINSTALL", "autograd_library", "torch_interface"]

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
"""Whether this CPython is one without a GIL, which has no stable interface."""

PYTHON = "{}.{}".format(*sys.version_info) + "t" * FREE_THREADED
"""This CPython, as libraries for one alone name it: ``"3.13"``, or ``"3.13t"`` of one without a GIL."""

MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" if FREE_THREADED else "_C.abi3.so"
"""On the stable interfaces of CPython and of torch: one file for every version of both."""


REINSTALL = "pip install ./kernels --no-build-isolation --force-reinstall --no-deps"
"""What brings a library that is missing, in a checkout."""


def torch_interface(version: str) -> str:
    """Return what torches that run each other's C++ code have in common: ``"2.13"`` of every release 2.13.x.

    A version that is no release, such as ``"2.14.0a0+git1234"``, is alike to itself alone.
    """
    release = re.fullmatch(r"(\d+\.\d+)(\.\d+)*(\+(cpu|cu\d+|rocm[\d.]+|xpu))?", version)
    return release[1] if release else version


def autograd_library(torch: str, python: str) -> str:
    """Return the file of autograd's library, e.g. ``"_C_autograd-torch2.13-cp311.so"``.

    Args:
        torch: A torch version, such as ``"2.13.0+cpu"``.
        python: A CPython, such as :data:`PYTHON`.
    """
    return f"_C_autograd-torch{torch_interface(torch)}-cp{python.replace('.', '')}.so"
