"""What every run of the tests has in common: which backends it is about, and where randomness comes from."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from coreai_kernels import native

WITHOUT_NATIVE = "COREAI_TEST_WITHOUT_NATIVE"
_KERNELS = Path(__file__).parent / "kernels"
# Of tests/kernels, what compares Triton's kernels with the reference. The rest compares "auto" with it, which
# without a native backend is the reference itself.
_TRITON = ("test_triton_interpreter", "test_triton_aot", "test_rounding")

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to run where tests of kernels would pass without a kernel."""
    missing = native.missing or native.autograd_missing
    expected = os.environ.get(WITHOUT_NATIVE) == "1"
    if missing and not expected:
        pytest.exit(
            f"the native backend is not loaded: {missing} (make build). "
            f"{WITHOUT_NATIVE}=1 says that this is the run of an installation without it.",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
    if expected and not native.missing:
        pytest.exit(
            f"{WITHOUT_NATIVE}=1, but the native backend is loaded", returncode=pytest.ExitCode.USAGE_ERROR
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the native backend, leave out the tests that would compare the reference with itself."""
    if native.missing is None:
        return
    skip = pytest.mark.skip(reason="compares the native backend with the reference")
    for item in items:
        if _KERNELS in item.path.parents and not item.path.name.startswith(_TRITON):
            item.add_marker(skip)
