"""Loops that look at the accuracy, with accuracies that are known functions of the rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coreai_opt.controllers import (
    create_accuracy_aware_training_loop,
    create_compressed_model,
    register_default_init_args,
)

from ..support import batch, configured, loader, make_model

SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3, "params": {"sparsity_target": 0.3}}


def section(mode: str, **params: Any) -> dict[str, Any]:
    return {"accuracy_aware_training": {"mode": mode, "params": params}}


class Recorder:
    """Trains nothing, and measures ``accuracy(rate)``."""

    def __init__(self, controller: Any, accuracy: Any) -> None:
        self.controller, self.accuracy = controller, accuracy
        self.rates: list[float] = []
        self.learning_rates: list[float] = []

    def train(self, controller: Any, model: nn.Module, epoch: int, optimizer: Any, lr_scheduler: Any) -> None:
        controller.scheduler.epoch_step()
        self.rates.append(controller.compression_rate)
        if optimizer is not None:
            self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def validate(self, model: nn.Module, epoch: int) -> float:
        return self.accuracy(self.controller.compression_rate)


def test_the_search_ends_below_the_highest_rate_that_will_do() -> None:
    search = section(
        "adaptive_compression_level",
        initial_training_phase_epochs=1,
        maximal_absolute_accuracy_degradation=0.05,
        patience_epochs=2,
    )
    config = configured(SPARSE, **search)
    controller, model = create_compressed_model(make_model(), config)
    recorder = Recorder(controller, lambda rate: 0.9 if rate <= 0.62 else 0.5)
    loop = create_accuracy_aware_training_loop(config, controller, 0.92, show_progress=False)
    loop.run(
        model,
        recorder.train,
        recorder.validate,
        lambda: (torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    report = loop.report
    # Up in steps of 0.1 until 0.7 fails twice; down by 0.05 to 0.65, which fails twice; down to 0.6, which
    # will do; up by 0.025 to 0.625, which fails twice; then the step of 0.0125 is too small.
    expected = [0.3, 0.4, 0.5, 0.6, 0.7, 0.7, 0.65, 0.65, 0.6, 0.625, 0.625]
    assert [round(rate, 4) for rate in recorder.rates] == expected
    assert report.accurate_enough
    assert report.compression_rate == pytest.approx(0.6)
    assert controller.compression_rate == pytest.approx(0.6)
    zeros = sum(int((each == 0).sum()) for each in controller.masks().values())
    assert zeros / sum(each.numel() for each in controller.masks().values()) == pytest.approx(0.6, abs=0.01)
    assert recorder.learning_rates[4:6] == [1.0, 0.5]  # lower after an epoch without success
    assert "least accuracy" in report.to_str()
    assert len(report.epochs) == len(recorder.rates)


def test_a_rate_that_is_too_high_from_the_start_falls() -> None:
    config = configured(
        SPARSE, **section("adaptive_compression_level", initial_training_phase_epochs=1, patience_epochs=1)
    )
    controller, model = create_compressed_model(make_model(), config)
    recorder = Recorder(controller, lambda rate: 1.0 if rate <= 0.15 else 0.1)
    loop = create_accuracy_aware_training_loop(config, controller, 1.0, show_progress=False)
    loop.run(model, recorder.train, recorder.validate)
    assert loop.report.accurate_enough
    assert 0.1 <= loop.report.compression_rate <= 0.15


def test_without_success_the_most_accurate_model_is_kept() -> None:
    config = configured(SPARSE, **section("adaptive_compression_level", initial_training_phase_epochs=1,
                                          patience_epochs=1, maximal_total_epochs=3))  # fmt: skip
    controller, model = create_compressed_model(make_model(), config)
    recorder = Recorder(controller, lambda rate: 0.5 - rate)
    loop = create_accuracy_aware_training_loop(config, controller, 1.0, show_progress=False)
    loop.run(model, recorder.train, recorder.validate)
    assert not loop.report.accurate_enough
    assert loop.report.reason == "maximal_total_epochs are over"
    assert loop.report.accuracy == max(each.accuracy for each in loop.report.epochs)


def test_early_exit_waits_for_full_compression_and_accuracy(tmp_path: Path) -> None:
    growing = {
        "algorithm": "magnitude_sparsity",
        "params": {"sparsity_target": 0.5, "sparsity_target_epoch": 2},
    }
    config = configured(growing, **section("early_exit", maximal_relative_accuracy_degradation=10.0))
    controller, model = create_compressed_model(make_model(), config)
    accuracies = iter([0.95, 0.95, 0.8, 0.85, 0.91, 0.99])
    loop = create_accuracy_aware_training_loop(config, controller, 1.0, show_progress=False)
    dumped: list[int] = []
    loop.run(
        model,
        Recorder(controller, None).train,
        lambda model, epoch: next(accuracies),
        dump_checkpoint_fn=lambda model, controller, runner, log_dir: dumped.append(len(dumped)),
        log_dir=tmp_path,
    )
    assert len(loop.report.epochs) == 5
    assert (loop.report.accuracy, loop.report.accurate_enough, loop.report.reason) == (
        0.91,
        True,
        "accurate enough",
    )
    assert dumped == list(range(5))
    assert "0.91" in (tmp_path / "report.txt").read_text()


def test_real_training_with_the_measured_accuracy() -> None:
    measured: list[str] = []

    def evaluate(model: nn.Module, data: Any) -> float:
        measured.append(type(model).__name__)
        with torch.no_grad():
            return -sum(float(F.cross_entropy(model.eval()(x), y)) for x, y in data)

    config = {"compression": SPARSE, **section("early_exit", maximal_absolute_accuracy_degradation=5.0)}
    checked = register_default_init_args(config, loader(), val_loader=loader(), model_eval_fn=evaluate)
    model = make_model()
    controller, model = create_compressed_model(model, checked)
    assert measured == ["Net"]

    def train(controller: Any, model: nn.Module, epoch: int, optimizer: Any, lr_scheduler: Any) -> None:
        model.train()
        controller.scheduler.epoch_step()
        for step in range(3):
            controller.scheduler.step()
            x, y = batch(step)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + controller.loss()).backward()
            optimizer.step()

    loop = create_accuracy_aware_training_loop(checked, controller, show_progress=False)
    trained = loop.run(
        model, train, lambda model, epoch: evaluate(model, loader()),
        lambda: (torch.optim.SGD(model.parameters(), lr=0.05), None),
    )  # fmt: skip
    assert loop.report.accurate_enough
    assert evaluate(trained, loader()) == loop.report.accuracy


def test_what_is_missing_is_named() -> None:
    controller, _ = create_compressed_model(make_model(), configured(SPARSE))
    with pytest.raises(ValueError, match="has no accuracy_aware_training"):
        create_accuracy_aware_training_loop(configured(SPARSE), controller, 1.0)
    with pytest.raises(ValueError, match="needs the accuracy of the uncompressed model"):
        create_accuracy_aware_training_loop(configured(SPARSE, **section("early_exit")), controller)
    fixed, _ = create_compressed_model(make_model(), configured({"algorithm": "const_sparsity"}))
    config = configured({"algorithm": "const_sparsity"}, **section("adaptive_compression_level"))
    with pytest.raises(NotImplementedError, match="cannot be set"):
        create_accuracy_aware_training_loop(config, fixed, 1.0)
    both = {"maximal_relative_accuracy_degradation": 1, "maximal_absolute_accuracy_degradation": 1}
    with pytest.raises(ValueError, match="exclude"):
        configured(SPARSE, **section("early_exit", **both))
