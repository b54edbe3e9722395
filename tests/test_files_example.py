"""The example that writes files, with few epochs."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

FOLDER = Path(__file__).resolve().parent.parent / "examples"
MODULES = ("digits_files", "digits_model", "training")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_files_classify_alike(tmp_path: Path) -> None:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    arguments = ["--epochs", "12", "--width", "32", "--out", str(tmp_path)]
    found = importlib.import_module("digits_files").main(arguments)
    assert set(found) == {".aimodel", ".onnx"}
    assert min(found.values()) > 0.2  # a few steps beat chance, 10 %
    assert max(found.values()) - min(found.values()) <= 0.02
    assert {path.suffix for path in tmp_path.iterdir()} == set(found)
