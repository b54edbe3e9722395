"""The older interface: one object, steps after the optimizer's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from coreai_opt.controllers import CompressionAlgorithm, create_compressed_model
from coreai_opt.controllers.nncf1 import CompressionLoss, CompressionScheduler

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


class Rounding(CompressionAlgorithm):
    """A method without a loss or a scheduler of its own: the base's are used."""

    def prepare_for_export(self, model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_((parameter * self.config["steps"]).round() / self.config["steps"])
        return model


class Shrinking(CompressionAlgorithm):
    """A method with a loss and a scheduler of its own."""

    class Loss(CompressionLoss):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.weight, self.factor = model.head.weight, 0.0

        def forward(self) -> torch.Tensor:
            return self.factor * self.weight.abs().mean()

        def statistics(self) -> dict[str, Any]:
            return {"magnitude": float(self.weight.detach().abs().mean())}

    class Scheduler(CompressionScheduler):
        def __init__(self, loss: Any) -> None:
            super().__init__()
            self.loss = loss

        def step(self, last: int | None = None) -> None:
            super().step(last)
            self.loss.factor = 0.1 * self.last_step

    def __init__(self, model: nn.Module, config: dict[str, Any], input_size: Any = None) -> None:
        super().__init__(model, config, input_size)
        self._loss = self.Loss(model)
        self._scheduler = self.Scheduler(self._loss)


def test_a_method_without_loss_and_scheduler_has_the_defaults(tmp_path: Path) -> None:
    model = make_model()
    method = Rounding(model, {"steps": 4}, (1, 1, 8, 8))
    assert type(method) is Rounding
    assert method.model is model
    assert float(method.loss()) == 0
    assert method.loss().shape == ()
    assert method.statistics() == {"loss": 0.0}
    assert list(method.loss.parameters()) == []  # the model's parameters are not the loss's
    method.initialize(loader())
    method.distributed()
    method.scheduler.step()
    method.scheduler.step()
    method.scheduler.epoch_step()
    assert method.scheduler.state_dict() == {"last_step": 2, "last_epoch": 1}
    method.scheduler.step(last=9)
    other = Rounding(make_model(), {"steps": 4}).scheduler
    other.load_state_dict(method.scheduler.state_dict())
    assert (other.last_step, other.last_epoch) == (9, 1)


def test_a_method_without_an_example_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give input_size"):
        Rounding(make_model(), {"steps": 4}).export_model(tmp_path / "model.onnx")


def test_a_method_with_loss_and_scheduler() -> None:
    method = Shrinking(make_model(), {})
    optimizer = torch.optim.SGD(method.model.parameters(), lr=1.0)
    first = method.statistics()["magnitude"]
    for step in range(10):
        loss = (method.model(batch(step)[0]) * 0).sum() + 10 * method.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.scheduler.step()
    assert method.loss.factor == pytest.approx(1.0)  # type: ignore[union-attr]
    assert method.statistics()["magnitude"] < 0.8 * first


def test_a_method_prepares_a_copy_for_export(tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    import onnx

    method = Rounding(make_model(), {"steps": 4}, (1, 1, 8, 8))
    before = {name: value.clone() for name, value in method.model.state_dict().items()}
    method.export_model(tmp_path / "model.onnx")
    for name, value in method.model.state_dict().items():
        assert torch.equal(value, before[name])
    graph = onnx.load(tmp_path / "model.onnx").graph
    head = next(each for each in graph.initializer if each.name == "head.weight")
    values = torch.from_numpy(onnx.numpy_helper.to_array(head).copy())
    assert torch.equal(values * 4, (values * 4).round())
