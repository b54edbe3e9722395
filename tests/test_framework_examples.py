"""The examples under examples/frameworks run, each on a model of a few thousand weights."""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "frameworks"
NEEDS = {
    "accelerate_loop": ("accelerate", "transformers"),
    "generate": ("transformers",),
    "lightning_digits": ("lightning", "sklearn"),
    "lora_over_int4": ("peft", "transformers"),
    "recipe": ("transformers",),
}


def _main(name: str, monkeypatch: pytest.MonkeyPatch):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


def test_each_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NEEDS, "tiny"}


def test_accelerate(monkeypatch):
    assert _main("accelerate_loop", monkeypatch)() < 3  # of 3.5 without training


def test_generation_with_a_cache_and_after_saving(monkeypatch):
    assert len(_main("generate", monkeypatch)()) == 8


def test_lightning(monkeypatch):
    assert _main("lightning_digits", monkeypatch)() > 0.85


def test_adapters(monkeypatch):
    before, merged = _main("lora_over_int4", monkeypatch)()
    assert merged < before - 0.5


def test_a_recipe_goes_on_bit_for_bit(monkeypatch):
    _main("recipe", monkeypatch)()
