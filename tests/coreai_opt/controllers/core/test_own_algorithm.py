"""An algorithm that a user registers from one file: statistics, resume, strip, export."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from coreai_opt.controllers import BaseCompressionAlgorithmBuilder, CompressionStatistics
from coreai_opt.controllers.core.statistics import AlgorithmStatistics

from ..support import Run, assert_same_state, check_compiles, configured

pytest.importorskip("sklearn")  # the example's data
FOLDER = Path(__file__).resolve().parents[4] / "examples" / "controllers"
OWN = {"algorithm": "ternary_weights"}
SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example that registers it; unregistered afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("ternary_weights")
    for registry in (BaseCompressionAlgorithmBuilder.REGISTRY, AlgorithmStatistics.REGISTRY):
        registry.pop("ternary_weights")
    for name in ("ternary_weights", "common"):
        sys.modules.pop(name, None)


def test_it_reports_statistics_beside_the_others() -> None:
    run = Run(configured(OWN, SPARSE))
    run.train(1)
    found = run.controller.statistics()
    assert found.ternary_weights.ternary_layers == 1
    assert [each.ternary for each in found.ternary_weights.layers] == [True, False, False]
    assert found.magnitude_sparsity.layers
    assert found.quantization is None
    assert set(found.to_dict()) == {"ternary_weights", "magnitude_sparsity"}
    assert "ternary layers" in found.to_str()
    with pytest.raises(AttributeError, match="no entry 'binary_weights'"):
        _ = found.binary_weights


def test_it_resumes_to_the_bit() -> None:
    config = configured(OWN)
    whole = Run(config)
    whole.train(4)
    resumed = Run.resumed(config, whole.save())
    for run in (whole, resumed):
        run.train()
    assert_same_state(resumed.snapshot(), whole.snapshot(), "resumed")
    assert whole.controller.statistics().ternary_weights.ternary_layers == 3


def test_it_strips_and_compiles() -> None:
    run = Run(configured(OWN))
    run.train()
    run.model.eval()
    x = torch.randn(2, 1, 8, 8)
    stripped = run.controller.strip()
    assert torch.equal(stripped(x), run.model(x))
    assert stripped.inner.weight.unique().numel() == 3
    assert not any("parametrizations" in name for name, _ in stripped.named_parameters())
    check_compiles(configured(OWN))


def test_it_exports(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import onnxruntime

    run = Run(configured(OWN))
    run.train()
    run.controller.export_model(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(2, 1, 8, 8)
    feed = {session.get_inputs()[0].name: x.numpy()}
    expected = run.model.eval()(x).detach()
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_pickled_and_compared() -> None:
    import copy
    import pickle

    run: Any = Run(configured(SPARSE))
    found = run.controller.statistics()
    assert pickle.loads(pickle.dumps(found)) == found == copy.deepcopy(found)
    assert found != CompressionStatistics()
