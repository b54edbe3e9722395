"""Several algorithms on one model."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.controllers.core.api import CompressionAlgorithmBuilder, CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.losses import CompositeCompressionLoss
from coreai_opt.controllers.core.lowering import LoweredActivation, LoweredWeight
from coreai_opt.controllers.core.plan import PlannedChange
from coreai_opt.controllers.core.schedulers import CompositeCompressionScheduler
from coreai_opt.controllers.core.statistics import CompressionStatistics
from coreai_opt.controllers.core.undo import undone_on_error

__all__ = ["CompositeCompressionAlgorithmBuilder", "CompositeCompressionAlgorithmController"]


class CompositeCompressionAlgorithmController(BaseCompressionAlgorithmController):
    """Sums the losses, steps all schedulers and combines the stages of the algorithms on one model.

    Its compression rate is that of the one algorithm whose rate can be set, if there is exactly one; else the
    share of the model that remains after each algorithm has taken away its rate, subtracted from 1. Setting
    the rate is for the former case alone.

    Args:
        target_model: the compressed model.
        children: the controllers, in the order in which the algorithms were built in.
    """

    def __init__(
        self, target_model: nn.Module, children: Sequence[BaseCompressionAlgorithmController]
    ) -> None:
        super().__init__(target_model)
        self._children = tuple(children)
        self._name = "composite"
        self.context = children[0].context
        self._gather()

    def _gather(self) -> None:
        self._loss = CompositeCompressionLoss([child.loss for child in self._children])
        self._scheduler = CompositeCompressionScheduler([child.scheduler for child in self._children])

    @property
    def child_ctrls(self) -> tuple[BaseCompressionAlgorithmController, ...]:
        """The controllers of the algorithms."""
        return self._children

    def _settable(self) -> list[BaseCompressionAlgorithmController]:
        base = BaseCompressionAlgorithmController._set_compression_rate
        return [child for child in self._children if type(child)._set_compression_rate is not base]

    def _get_compression_rate(self) -> float:
        settable = self._settable()
        if len(settable) == 1:
            return settable[0].compression_rate
        remaining = 1.0
        for child in self._children:
            remaining *= 1 - child.compression_rate
        return 1 - remaining

    def _set_compression_rate(self, compression_rate: float) -> None:
        settable = self._settable()
        if len(settable) != 1:
            names = [child.name for child in settable]
            raise NotImplementedError(
                f"compression_rate is settable where exactly one algorithm has a settable rate; here "
                f"{names or 'none'}: set it on a controller of child_ctrls"
            )
        settable[0].compression_rate = compression_rate

    @property
    def maximal_compression_rate(self) -> float:
        """The least of the algorithms'."""
        return min(child.maximal_compression_rate for child in self._children)

    def compression_stage(self) -> CompressionStage:
        """All stages combined."""
        return CompressionStage.combine(child.compression_stage() for child in self._children)

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """Those of all algorithms."""
        merged = CompressionStatistics()
        for child in self._children:
            merged = merged.merged(child.statistics(quickly_collected_only))
        return merged

    def strip_model(self, model: nn.Module) -> None:
        """Strip what each algorithm added, the last one first."""
        for child in reversed(self._children):
            child.strip_model(model)

    def lower_model(self, model: nn.Module) -> None:
        """Lower what each algorithm added, the last one first."""
        for child in reversed(self._children):
            child.lower_model(model)

    def finish_lowering(self, model: nn.Module) -> None:
        """Let each algorithm finish."""
        for child in self._children:
            child.finish_lowering(model)

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """Those of each algorithm, the first one first."""
        for child in self._children:
            yield from child.lowered_weights(model, backend)

    def lowered_activations(self, model: nn.Module) -> Iterator[LoweredActivation]:
        """Those of each algorithm."""
        for child in self._children:
            yield from child.lowered_activations(model)

    def observe_over_ranks(self) -> None:
        """Let all algorithms follow the data of all ranks."""
        for child in self._children:
            child.observe_over_ranks()

    def _planned(self, epochs: int, steps_per_epoch: int | None) -> list[PlannedChange]:
        changes = [each for child in self._children for each in child._planned(epochs, steps_per_epoch)]
        return sorted(changes, key=lambda each: (each.epoch, each.step))

    def disable_scheduler(self) -> None:
        """Disable the schedulers of all algorithms."""
        counters = self._scheduler
        for child in self._children:
            child.disable_scheduler()
        self._gather()
        for name in ("_current_step", "_current_epoch", "_step_in_epoch"):
            setattr(self._scheduler, name, getattr(counters, name))
        self._scheduler_is_disabled = True

    def get_state(self) -> State:
        """The states of the algorithms by their names, and the common counters."""
        counters = self._scheduler
        own = {
            "current_step": counters.current_step,
            "current_epoch": counters.current_epoch,
            "step_in_epoch": getattr(counters, "_step_in_epoch", -1),
        }
        state: State = {self.name: own}
        for child in self._children:
            state |= child.get_state()
        return state

    def load_state(self, state: State) -> None:
        """Load the states of the algorithms that are there."""
        for child in self._children:
            child.load_state(state)
        self._gather()
        for name, value in state.get(self.name, {}).items():
            setattr(self._scheduler, f"_{name}", value)

    def get_compression_state(self) -> State:
        """The states of all builders and controllers.

        Raises:
            RuntimeError: a builder has not handed over its state.
        """
        builders: State = {}
        for child in self._children:
            builders |= child.get_compression_state()["builder_state"]
        return {"builder_state": builders, "ctrl_state": self.get_state()}


class CompositeCompressionAlgorithmBuilder(CompressionAlgorithmBuilder):
    """Builds several algorithms into a model, each once.

    Args:
        builders: of the algorithms.

    Raises:
        ValueError: two are of one algorithm, under whose name there is one state.
    """

    def __init__(self, builders: Sequence[BaseCompressionAlgorithmBuilder]) -> None:
        self.builders = tuple(sorted(builders, key=lambda builder: builder.order))
        names = [builder.name for builder in self.builders]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"each algorithm may be there once; configured more than once: {twice}")

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Build them in, after all have looked whether they can. An error leaves the model as it was."""
        with undone_on_error(model):
            for builder in self.builders:
                builder.check(model)
            for builder in self.builders:
                builder.apply_to(model)
        return model

    def build_controller(self, model: nn.Module) -> BaseCompressionAlgorithmController:
        """The composite controller; of a single algorithm, its own."""
        children = []
        for builder in self.builders:
            child = builder.build_controller(model)
            builder.hand_over(child)
            children.append(child)
        return children[0] if len(children) == 1 else CompositeCompressionAlgorithmController(model, children)

    def get_state(self) -> State:
        """The builders' states by name."""
        state: dict[str, Any] = {}
        for builder in self.builders:
            state |= builder.get_state()
        return state

    def load_state(self, state: State) -> None:
        """Give each builder its own."""
        for builder in self.builders:
            builder.load_state(state)
