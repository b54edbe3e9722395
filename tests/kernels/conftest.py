"""Fixtures of the kernels' tests, and which of these need what."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

from coreai_kernels import native

# Kernels are compiled, or interpreted, throughout a process.
if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_triton_aot_*.py"]


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Names and results of all kernels that the test's operator would launch on the architecture ``arch``."""
    from tests.kernels.aot_support import compile_only

    return compile_only(request.node.callspec.params["arch"], monkeypatch)


def _instruction_sets() -> list[str]:
    if native.extension is None:
        return ["none"]
    built = native.extension.build_info()["cpu_isas"].split()
    return built[: built.index(native.extension.cpu_capability()) + 1]


@pytest.fixture(scope="module", params=_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the module's tests at each instruction set that the native backend has here."""
    if native.extension is None:
        pytest.skip("no native extension")
    best = native.extension.cpu_capability()
    native.extension.set_cpu_capability(request.param)
    yield request.param
    native.extension.set_cpu_capability(best)
