"""Training that looks at the accuracy: it ends early, or searches the highest rate that the accuracy allows.

``early_exit``
    Epochs as the configuration says, until the model is compressed fully and accurate enough.
``adaptive_compression_level``
    After an initial phase as the configuration says, the schedule is disabled. Where the accuracy will do,
    the rate rises by a step; where it does not within ``patience_epochs``, it falls. Whenever the direction
    turns, the step shrinks; the search ends when it is smaller than ``minimal_compression_rate_step``. The
    model becomes that of the highest rate that was accurate enough.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from coreai_opt._utils.writing import write_text
from coreai_opt.controllers.core.api import CompressionStage
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmController
from coreai_opt.controllers.core.config import AccuracyAwareConfig, AccuracyAwareParams, ControllerConfig
from coreai_opt.controllers.core.statistics import AlgorithmStatistics

__all__ = [
    "AccuracyAwareTraining",
    "AdaptiveCompressionTraining",
    "EarlyExitTraining",
    "EpochRecord",
    "TrainingReport",
    "create_accuracy_aware_training_loop",
]


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: the rate that it was trained at, and the accuracy after it."""

    epoch: int
    compression_rate: float
    accuracy: float
    stage: str
    accurate_enough: bool


@dataclass(frozen=True)
class TrainingReport(AlgorithmStatistics):
    """What a loop did.

    Fields:
        uncompressed_accuracy: of the model before compression.
        least_accuracy: that will do.
        accuracy, compression_rate: of the model that was kept.
        accurate_enough: whether it is compressed fully and accurate enough.
        reason: why training ended.
        epochs: one record each.
    """

    uncompressed_accuracy: float
    least_accuracy: float
    accuracy: float
    compression_rate: float
    accurate_enough: bool
    reason: str
    epochs: list[EpochRecord] = field(default_factory=list)


@dataclass(frozen=True)
class _Kept:
    """A model and its controller, as they were after an epoch."""

    accuracy: float
    rate: float
    enough: bool
    model: dict[str, Any]
    controller: dict[str, Any]

    @property
    def order(self) -> tuple[bool, float, float]:
        """The better, the greater: accurate enough at a higher rate, else the more accurate."""
        return (self.enough, self.rate if self.enough else 0.0, self.accuracy)


class AccuracyAwareTraining:
    """Base of the loops.

    Args:
        controller: of the compressed model.
        params: of the loop.
        uncompressed_accuracy: of the model before compression; None for what
            :func:`.create_compressed_model` measured.
        show_progress: print a progress bar.

    Raises:
        ValueError: nobody knows the accuracy of the uncompressed model.
    """

    def __init__(
        self,
        controller: BaseCompressionAlgorithmController,
        params: AccuracyAwareParams | None = None,
        uncompressed_accuracy: float | None = None,
        show_progress: bool = True,
    ) -> None:
        if uncompressed_accuracy is None:
            uncompressed_accuracy = controller.context.uncompressed_accuracy
        if uncompressed_accuracy is None:
            raise ValueError(
                "accuracy-aware training needs the accuracy of the uncompressed model: give "
                "uncompressed_accuracy, or register model_eval_fn with register_default_init_args and have "
                "accuracy_aware_training in the configuration"
            )
        self.controller = controller
        self.params = params or AccuracyAwareParams()
        self.uncompressed_accuracy = float(uncompressed_accuracy)
        self.least_accuracy = self.params.least(self.uncompressed_accuracy)
        self._show_progress = show_progress
        self._records: list[EpochRecord] = []
        self._best: _Kept | None = None
        self._learning_rate_factor = 1.0
        self.report: TrainingReport | None = None

    def run(
        self,
        model: nn.Module,
        train_epoch_fn: Callable[..., Any],
        validate_fn: Callable[..., Any],
        configure_optimizers_fn: Callable[[], tuple[Any, Any]] | None = None,
        dump_checkpoint_fn: Callable[..., Any] | None = None,
        early_stopping_fn: Callable[[float], bool] | None = None,
        log_dir: str | Path | None = None,
    ) -> nn.Module:
        """Train, and return the model with the best compression that was found; :attr:`report` says more.

        Args:
            model: the compressed model, maybe wrapped for training.
            train_epoch_fn: ``(controller, model, epoch=, optimizer=, lr_scheduler=)`` trains one epoch, with
                the steps of ``controller.scheduler`` and the loss of the controller.
            validate_fn: ``(model, epoch=)`` to the accuracy, the greater the better.
            configure_optimizers_fn: makes an optimizer and a learning-rate scheduler, or None; called anew
                when the rate changes.
            dump_checkpoint_fn: ``(model, controller, runner, log_dir)``, called after each epoch.
            early_stopping_fn: of the accuracy; True ends the training.
            log_dir: where the report is written, as ``report.txt``.
        """
        self._functions = train_epoch_fn, validate_fn, configure_optimizers_fn, dump_checkpoint_fn
        self._stopping, self._model, self._log_dir = early_stopping_fn, model, log_dir
        self._bar = tqdm(
            total=self.params.maximal_total_epochs, disable=not self._show_progress, unit="epoch"
        )
        try:
            self._configure()
            reason = self._train()
        finally:
            self._bar.close()
        best = self._best
        assert best is not None  # an epoch was trained
        model.load_state_dict(best.model)
        self.controller.load_state(best.controller)
        self.report = TrainingReport(
            self.uncompressed_accuracy,
            self.least_accuracy,
            best.accuracy,
            best.rate,
            best.enough,
            reason,
            list(self._records),
        )
        if log_dir is not None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            write_text(Path(log_dir) / "report.txt", self.report.to_str() + "\n")
        return model

    def _train(self) -> str:
        """Train until the end; why it is one."""
        raise NotImplementedError

    def _configure(self) -> None:
        configure = self._functions[2]
        made: tuple[Any, Any] = (None, None) if configure is None else configure()
        self.optimizer, self.lr_scheduler = made
        for group in getattr(self.optimizer, "param_groups", []):
            group["lr"] *= self._learning_rate_factor

    def _epoch(self) -> EpochRecord:
        """Train an epoch, measure it, and keep the model if it is the best."""
        train, validate, _, dump = self._functions
        epoch = len(self._records)
        train(
            self.controller,
            self._model,
            epoch=epoch,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
        )
        accuracy = float(validate(self._model, epoch=epoch))
        stage, rate = self.controller.compression_stage(), self.controller.compression_rate
        enough = accuracy >= self.least_accuracy and self._counts(stage)
        record = EpochRecord(epoch, rate, accuracy, stage.name, enough)
        self._records.append(record)
        order = (enough, rate if enough else 0.0, accuracy)
        if self._best is None or order > self._best.order:
            states = copy.deepcopy((self._model.state_dict(), self.controller.get_state()))
            self._best = _Kept(accuracy, rate, enough, *states)
        if dump is not None:
            dump(self._model, self.controller, self, self._log_dir)
        self._bar.set_postfix(accuracy=f"{accuracy:.4g}", rate=f"{rate:.3f}", stage=stage.name.lower())
        self._bar.update()
        return record

    def _counts(self, stage: CompressionStage) -> bool:
        """Whether a model at this stage may be the result."""
        return stage is CompressionStage.FULLY_COMPRESSED

    def _stops(self, record: EpochRecord) -> str | None:
        """Why training ends after an epoch, whatever the loop is; None if it does not."""
        if self._stopping is not None and self._stopping(record.accuracy):
            return "early_stopping_fn ended it"
        if len(self._records) >= self.params.maximal_total_epochs:
            return "maximal_total_epochs are over"
        return None


class EarlyExitTraining(AccuracyAwareTraining):
    """Trains until the model is compressed fully and accurate enough. See the module."""

    def _train(self) -> str:
        while True:
            record = self._epoch()
            if record.accurate_enough:
                return "accurate enough"
            if (reason := self._stops(record)) is not None:
                return reason


class AdaptiveCompressionTraining(AccuracyAwareTraining):
    """Searches the highest compression rate that is accurate enough. See the module."""

    def _counts(self, stage: CompressionStage) -> bool:
        return len(self._records) + 1 >= self.params.initial_training_phase_epochs

    def _train(self) -> str:
        params = self.params
        for _ in range(params.initial_training_phase_epochs):
            record = self._epoch()
            if (reason := self._stops(record)) is not None:
                return reason
        self.controller.disable_scheduler()
        step, direction = params.initial_compression_rate_step, 0
        record = self._records[-1] if self._records else self._epoch()
        enough = record.accuracy >= self.least_accuracy
        while True:
            wanted = 1 if enough else -1
            if direction and wanted != direction:
                step *= params.compression_rate_step_reduction_factor
            direction = wanted
            if step < params.minimal_compression_rate_step:
                return "the step is smaller than minimal_compression_rate_step"
            rate = self.controller.compression_rate
            target = min(max(rate + direction * step, 0.0), self.controller.maximal_compression_rate)
            if target == rate:
                return f"the compression rate is at its limit, {rate:g}"
            self.controller.compression_rate = target
            self._learning_rate_factor = 1.0
            self._configure()
            enough = False
            for _ in range(params.patience_epochs):
                record = self._epoch()
                enough = record.accurate_enough
                if (reason := self._stops(record)) is not None:
                    return reason
                if enough:
                    break
                self._learning_rate_factor *= params.lr_reduction_factor
                self._configure()


_LOOPS: dict[str, type[AccuracyAwareTraining]] = {
    "early_exit": EarlyExitTraining,
    "adaptive_compression_level": AdaptiveCompressionTraining,
}


def create_accuracy_aware_training_loop(
    config: ControllerConfig | Mapping[str, Any] | str | Path,
    controller: BaseCompressionAlgorithmController,
    uncompressed_model_accuracy: float | None = None,
    show_progress: bool = True,
) -> AccuracyAwareTraining:
    """The loop that the configuration's ``accuracy_aware_training`` asks for.

    Args:
        config: as for :func:`.create_compressed_model`.
        controller: of the compressed model.
        uncompressed_model_accuracy: None for what :func:`.create_compressed_model` measured.
        show_progress: print a progress bar.

    Raises:
        ValueError: the configuration has no such section, or nobody knows the uncompressed accuracy.
        NotImplementedError: the compression rate is to be searched, and cannot be set.
    """
    section: AccuracyAwareConfig | None = ControllerConfig.load(config).accuracy_aware_training
    if section is None:
        raise ValueError("the configuration has no accuracy_aware_training, with mode and params")
    if section.mode == "adaptive_compression_level":
        controller.compression_rate = controller.compression_rate  # raises where it cannot be set
    return _LOOPS[section.mode](controller, section.params, uncompressed_model_accuracy, show_progress)
