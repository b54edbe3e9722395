"""What a training loop sees of compression: stages, losses, schedulers, controllers and their builders.

The interface is that of NNCF 2.x. A loop calls, in this order::

    controller, model = create_compressed_model(model, config)
    for epoch in ...:
        controller.scheduler.epoch_step()
        for inputs, targets in ...:
            controller.scheduler.step()
            loss = criterion(model(inputs), targets) + controller.loss()
            ...
    controller.export_model("model.onnx")
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coreai_opt.controllers.core.statistics import CompressionStatistics

__all__ = [
    "CompressionAlgorithmBuilder",
    "CompressionAlgorithmController",
    "CompressionLoss",
    "CompressionScheduler",
    "CompressionStage",
    "State",
]

State = dict[str, Any]
"""Nested dicts, lists and tuples of numbers, strings, None and tensors: ``torch.load(weights_only=True)``
reads it."""


class CompressionStage(IntEnum):
    """How much of the compression asked for has been applied."""

    UNCOMPRESSED = 0
    PARTIALLY_COMPRESSED = 1
    FULLY_COMPRESSED = 2

    def __add__(self, other: int) -> "CompressionStage":
        """The stage of two algorithms together: their own if they agree, else PARTIALLY_COMPRESSED."""
        stage = CompressionStage(other)
        return self if self is stage else CompressionStage.PARTIALLY_COMPRESSED

    @classmethod
    def combine(cls, stages: Iterable["CompressionStage"]) -> "CompressionStage":
        """The stage of several algorithms together; of none, UNCOMPRESSED."""
        distinct = set(stages)
        if not distinct:
            return cls.UNCOMPRESSED
        return distinct.pop() if len(distinct) == 1 else cls.PARTIALLY_COMPRESSED


class CompressionLoss(ABC):
    """What compression adds to the loss of the task."""

    @abstractmethod
    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a 0-d tensor on the model's device."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same as :meth:`calculate`."""
        return self.calculate(*args, **kwargs)

    def get_state(self) -> State:
        """What is needed to continue later."""
        return {}

    def load_state(self, state: State) -> None:  # noqa: B027  (most losses have nothing to load)
        """Continue from what :meth:`get_state` returned."""


class CompressionScheduler(ABC):
    """Drives an algorithm through the training run. Counters start at -1: nothing has been applied yet."""

    @property
    @abstractmethod
    def current_step(self) -> int:
        """Index of the optimizer step that is being made, over all epochs; -1 before the first."""

    @property
    @abstractmethod
    def current_epoch(self) -> int:
        """Index of the epoch that is being trained; -1 before the first."""

    @abstractmethod
    def step(self, next: int | None = None) -> None:
        """Call before each optimizer step.

        Args:
            next: index of the step that begins; None for the one after the current.
        """

    @abstractmethod
    def epoch_step(self, next: int | None = None) -> None:
        """Call before each epoch.

        Args:
            next: index of the epoch that begins; None for the one after the current.
        """

    @abstractmethod
    def get_state(self) -> State:
        """What is needed to continue later, at any step."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Continue from what :meth:`get_state` returned."""


class CompressionAlgorithmController(ABC):
    """Controls an algorithm that has been built into a model.

    Args:
        target_model: the model with the algorithm built in.
    """

    def __init__(self, target_model: nn.Module) -> None:
        self._model = target_model

    @property
    def model(self) -> nn.Module:
        """The compressed model."""
        return self._model

    @property
    @abstractmethod
    def name(self) -> str:
        """The algorithm's name, under which its state is kept."""

    @property
    @abstractmethod
    def loss(self) -> CompressionLoss:
        """What to add to the loss of the task."""

    @property
    @abstractmethod
    def scheduler(self) -> CompressionScheduler:
        """What to step along with the training."""

    @property
    @abstractmethod
    def compression_rate(self) -> float:
        """Share of the model that has been compressed away, from 0 to 1; which share, is the algorithm's."""

    @compression_rate.setter
    @abstractmethod
    def compression_rate(self, compression_rate: float) -> None: ...

    @property
    @abstractmethod
    def maximal_compression_rate(self) -> float:
        """The highest rate that can be set."""

    @abstractmethod
    def compression_stage(self) -> CompressionStage:
        """How much of the compression asked for has been applied."""

    @abstractmethod
    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """Facts about the compressed model.

        Args:
            quickly_collected_only: leave out what needs a pass over the weights.
        """

    @abstractmethod
    def strip(self, do_copy: bool = True) -> nn.Module:
        """The model without what only training needs, with compressed values in its weights.

        Args:
            do_copy: leave the model itself as it is.
        """

    @abstractmethod
    def prepare_for_export(self) -> None:
        """Strip the model in place."""

    @abstractmethod
    def export_model(
        self,
        save_path: str | Path,
        save_format: str | None = None,
        input_names: list[str] | None = None,
        output_names: list[str] | None = None,
        model_args: tuple[Any, ...] | None = None,
    ) -> None:
        """Write the compressed model to a file for inference.

        Args:
            save_path: where to.
            save_format: ``"onnx"`` or ``"onnx_<opset>"``, the former opset 20, or 21 where there are 4-bit
                integers; ``"coreai"``, ``"coreml"`` or ``"torch"``, whose paths end in ``.aimodel``,
                ``.mlpackage`` and ``.pt2``. None for what the path's suffix says, else ``"onnx"``.
            input_names: names of the graph's inputs.
            output_names: names of the graph's outputs.
            model_args: positional arguments of the model's forward, followed by a dict of its keyword
                arguments, always: ``(a, b, {})``, ``({"x": None},)``. None stands for ``({},)``.
        """

    @abstractmethod
    def disable_scheduler(self) -> None:
        """Hold the compression rate where it is: further steps only count."""

    @abstractmethod
    def distributed(self) -> None:
        """Make all ranks of the process group start equal. Call it before wrapping the model."""

    @abstractmethod
    def set_builder_state_with_name(self, name: str, builder_state: State) -> None:
        """Take over the builder's state, which belongs to the compression state.

        Args:
            name: the name that the builder is registered under.
            builder_state: its state.
        """

    @abstractmethod
    def get_state(self) -> State:
        """``{name: {"loss_state", "scheduler_state", "compression_stage", ...}}``."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Continue from what :meth:`get_state` returned. States of other algorithms are ignored."""

    @abstractmethod
    def get_compression_state(self) -> State:
        """``{"builder_state", "ctrl_state"}``, for ``create_compressed_model(compression_state=...)``.

        The model's own ``state_dict`` is kept beside it.

        Raises:
            RuntimeError: the builder has not handed over its state.
        """


class CompressionAlgorithmBuilder(ABC):
    """Builds an algorithm into a model."""

    @abstractmethod
    def apply_to(self, model: nn.Module) -> nn.Module:
        """Change ``model`` in place, initialise what was added unless a state is loaded, and return it."""

    @abstractmethod
    def build_controller(self, model: nn.Module) -> CompressionAlgorithmController:
        """The controller for a model that this builder was applied to."""

    @abstractmethod
    def get_state(self) -> State:
        """What is needed to build the same again, by name of the algorithm."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Build later what the builder with this state had built. Other algorithms' states are ignored."""
