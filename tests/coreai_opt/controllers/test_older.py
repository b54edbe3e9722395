"""The older interface: one object, steps after the optimizer's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coreai_opt.controllers import create_compressed_model
from coreai_opt.controllers.older import CompressionAlgorithm

from .support import batch, configured, loader, make_model

SPARSE = {
    "algorithm": "rb_sparsity",
    "params": {
        "schedule": "polynomial",
        "update_per_optimizer_step": True,
        "steps_per_epoch": 3,
        "sparsity_target_epoch": 2,
    },
}


def test_steps_after_are_steps_before_shifted_by_one() -> None:
    algorithm = CompressionAlgorithm(make_model(), {"compression": SPARSE})
    controller, _ = create_compressed_model(make_model(), configured(SPARSE))
    for _ in range(3):
        controller.scheduler.epoch_step()
        for _ in range(3):
            controller.scheduler.step()
            assert algorithm.controller.level == controller.level
            algorithm.scheduler.step()
        algorithm.scheduler.epoch_step()
    assert (algorithm.scheduler.last_step, algorithm.scheduler.last_epoch) == (9, 3)
    algorithm.scheduler.epoch_step(last=1)
    assert algorithm.controller.scheduler.current_epoch == 1


def test_initialize_takes_ranges_from_data() -> None:
    algorithm = CompressionAlgorithm(make_model(), {"compression": {"algorithm": "quantization"}})
    with pytest.raises(ValueError, match="register a loader"):
        _ = algorithm.model
    algorithm.initialize(loader())
    assert algorithm.statistics()["quantization"]["quantized_activations"] == 3
    with pytest.raises(RuntimeError, match="already"):
        algorithm.initialize(loader())


def test_training_with_the_loss() -> None:
    algorithm = CompressionAlgorithm(make_model(), {"compression": SPARSE})
    algorithm.scheduler.epoch_step(1)
    model = algorithm.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    losses = []
    for step in range(15):
        x, y = batch(step)
        penalty = algorithm.loss()
        loss = torch.nn.functional.cross_entropy(model(x), y) + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(penalty.detach()))
    assert losses[-1] < losses[0]
    assert algorithm.loss.statistics()["loss"] >= 0
    assert "rb_sparsity" in algorithm.statistics()


def test_export(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    config: dict[str, Any] = {"compression": {"algorithm": "magnitude_sparsity"}}
    algorithm = CompressionAlgorithm(make_model(), config, input_size=(1, 1, 8, 8))
    algorithm.export_model(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000
