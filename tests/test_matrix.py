"""The matrix of torches and Pythons: what lets a torch for CUDA be imported where CUDA is not."""

import ctypes
import shutil
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"

pytestmark = [
    pytest.mark.skipif(not TOOLS.exists(), reason="needs the source tree"),
    pytest.mark.skipif(sys.platform != "linux", reason="libraries of Linux"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(TOOLS))
    import matrix

    path = tmp_path / "libcudart.so.12"
    matrix.make_stand_in(path, {"libcudart.so.12": {"cudaGetDeviceCount"}, "": {"cudaFree"}})
    return path


def test_a_stand_in_answers_that_there_is_no_device(stand_in):
    library = ctypes.CDLL(str(stand_in))
    assert library.cudaGetDeviceCount() == 100
    assert library.cudaFree() == 100


def test_a_stand_in_wants_no_executable_stack(stand_in):
    """A C library from 2.41 on refuses to load one that does: torch could not be imported."""
    executable = 1
    stack = [flags for kind, flags in program_headers(stand_in) if kind == 0x6474E551]  # PT_GNU_STACK
    assert stack, "without this segment the stack is executable"
    assert not stack[0] & executable


def program_headers(path: Path) -> list[tuple[int, int]]:
    """Return kind and flags of each segment of a 64-bit ELF file."""
    data = path.read_bytes()
    start, size, count = (
        int.from_bytes(data[at : at + length], "little") for at, length in ((32, 8), (54, 2), (56, 2))
    )
    entries = (data[start + size * index : start + size * (index + 1)] for index in range(count))
    return [(int.from_bytes(one[:4], "little"), int.from_bytes(one[4:8], "little")) for one in entries]
