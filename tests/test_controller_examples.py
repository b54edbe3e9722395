"""The examples of the controllers, with one short epoch each."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "controllers"
OTHERS = ("accuracy_aware", "common", "own_method_nncf1")
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in (*OTHERS, *NAMES):
        sys.modules.pop(name, None)


def test_there_is_one_for_each_algorithm() -> None:
    from coreai_opt.controllers import BaseCompressionAlgorithmBuilder

    assert BaseCompressionAlgorithmBuilder.list_registry_keys() <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example, common = importlib.import_module(name), importlib.import_module("common")
    controller, model = common.run(*example.ALGORITHMS, arguments=["--epochs", "1", "--images", "128"])
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert bool(torch.isfinite(model(torch.randn(2, 1, 8, 8))).all())
    assert set(controller.statistics().to_dict()) == {each["algorithm"] for each in example.ALGORITHMS}


def test_the_method_of_the_older_interface() -> None:
    method = importlib.import_module("own_method_nncf1").run(2, 128, None)
    assert (method.scheduler.last_epoch, method.loss.factor) == (2, 20.0)
    assert method.statistics()["loss"] > 0


def test_the_search_of_the_highest_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    report = importlib.import_module("accuracy_aware").run(3, 128)
    assert len(report.epochs) <= 3
    assert report.to_str() in capsys.readouterr().out


def test_the_demonstration_returns_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = importlib.import_module("composed").demonstrate(epochs=1, images=128)
    assert shown.statistics in capsys.readouterr().out
    assert set(shown.figures) == {"filter_pruning", "quantization", "knowledge_distillation"}
    assert 0 <= shown.accuracy_stripped <= 1
    assert 0 <= shown.compression_rate <= 1
