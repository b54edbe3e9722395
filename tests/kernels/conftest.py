"""Fixtures of the kernels' tests, and which of these need what."""

import importlib.util
import os
from typing import Any

import pytest

# Kernels are compiled, or interpreted, throughout a process.
if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_triton_aot_*.py"]


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Names and results of all kernels that the test's operator would launch on the architecture ``arch``."""
    from tests.kernels.aot_support import compile_only

    return compile_only(request.node.callspec.params["arch"], monkeypatch)
