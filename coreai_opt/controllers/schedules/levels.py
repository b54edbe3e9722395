"""Schedulers that give an algorithm its level as a function of steps and epochs."""

import math
from abc import abstractmethod
from typing import Any, ClassVar, Protocol

from coreai_opt._utils.registry_utils import ClassRegistryMixin
from coreai_opt.controllers.core.api import State
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler, Change
from coreai_opt.controllers.core.state import take
from coreai_opt.controllers.schedules import curves
from coreai_opt.controllers.schedules.params import ScheduleParams

__all__ = [
    "AdaptiveScheduler",
    "BaselineScheduler",
    "BiasedExponentialScheduler",
    "ExponentialScheduler",
    "FollowsLevel",
    "LevelScheduler",
    "MultistepScheduler",
    "PolynomialScheduler",
]


class FollowsLevel(Protocol):
    """A controller that a :class:`LevelScheduler` drives."""

    def set_level(self, level: float) -> None:
        """Compress to ``level`` now."""

    def freeze(self) -> None:
        """Keep what is compressed now from changing."""

    def achieved_level(self) -> float:
        """The level that was reached, which may wait for the device."""


class LevelScheduler(ClassRegistryMixin, BaseCompressionScheduler):
    """Base of the schedulers of sparsity and pruning; a configuration names them by their key here.

    Args:
        controller: gets the levels.
        initial: level at the start.
        target: level at the end.
        params: the schedule's parameters.
        steps_per_epoch: optimizer steps in an epoch, if the parameters do not give it.

    Raises:
        ValueError: a level is to change at each step, and nobody told how many steps an epoch has.
    """

    # Whether the level may change within an epoch.
    per_step: ClassVar[bool] = False

    def __init__(
        self,
        controller: FollowsLevel,
        initial: float,
        target: float,
        params: ScheduleParams,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(params.steps_per_epoch or steps_per_epoch)
        self.controller = controller
        self.initial = initial
        self.target = target
        self.params = params
        self._moves_by_step = params.update_per_optimizer_step and self.per_step
        if self._moves_by_step and not self._steps_per_epoch:
            raise ValueError(
                "update_per_optimizer_step needs the number of steps in an epoch: give steps_per_epoch in "
                "the algorithm's params, or register a data loader with register_default_init_args"
            )
        if params.update_per_optimizer_step and not self.per_step:
            raise ValueError(
                f"update_per_optimizer_step is for 'polynomial', 'exponential' and 'exponential_with_bias'; "
                f"{params.schedule!r} moves at epochs"
            )

    @property
    def level(self) -> float:
        """The level that the schedule asks for now."""
        return self.level_at(self._current_epoch, max(self._step_in_epoch, 0))

    @property
    def is_frozen(self) -> bool:
        """Whether the freezing epoch has been reached."""
        return self._current_epoch >= self._freeze_epoch()

    @abstractmethod
    def level_at(self, epoch: int, step: int = 0) -> float:
        """The level in ``epoch`` (-1: before the first) at its ``step``."""

    def _time(self, epoch: int, step: int) -> float:
        """Epochs that are over, with the share of the current one where the level moves by step."""
        if not (self._moves_by_step and self._steps_per_epoch):
            return epoch
        return epoch + min(step / self._steps_per_epoch, 1.0)

    def _freeze_epoch(self) -> float:
        return self.params.freeze_epoch

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """The levels at the epochs' beginnings, and at their last steps where they move by step."""
        changes: list[Change] = []
        last: float | None = None
        steps = self._steps_per_epoch or steps_per_epoch or 1
        for epoch in range(epochs):
            if epoch >= self._freeze_epoch():
                changes.append((epoch, 0, "frozen", None))
                break
            for step in sorted({0, steps - 1} if self._moves_by_step else {0}):
                level = self.level_at(epoch, step)
                if level != last:
                    changes.append((epoch, step, "level", level))
                    last = level
        return changes

    def step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        super().step(next)
        if self._moves_by_step and not self.is_frozen:
            self.controller.set_level(self.level)

    def epoch_step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        super().epoch_step(next)
        self._apply()

    def _apply(self) -> None:
        if self.is_frozen:
            self.controller.freeze()
        else:
            self.controller.set_level(self.level)


@LevelScheduler.register("polynomial")
class PolynomialScheduler(LevelScheduler):
    """:func:`.curves.polynomial`; the progress is ``(epoch + step / steps_per_epoch) / target epoch``."""

    per_step = True

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        progress = curves.share_of(self._time(epoch, step), self.params.target_epoch)
        return curves.polynomial(progress, self.initial, self.target, self.params.power, self.params.concave)


@LevelScheduler.register("exponential")
class ExponentialScheduler(LevelScheduler):
    """See :func:`.curves.exponential`."""

    per_step = True

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        first, count = self.params.exponential_epochs()
        if epoch < first:
            return self.initial
        progress = curves.share_of(self._time(epoch, step) - first, count)
        return curves.exponential(progress, self.initial, self.target)


@LevelScheduler.register("exponential_with_bias")
class BiasedExponentialScheduler(LevelScheduler):
    """See :func:`.curves.biased_exponential`."""

    per_step = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.level_at(0)  # raises for levels that no such curve joins

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        first, count = self.params.exponential_epochs()
        if epoch < first:
            return self.initial
        time = self._time(epoch, step) - first
        return curves.biased_exponential(time, self.initial, self.target, count)


@LevelScheduler.register("multistep")
class MultistepScheduler(LevelScheduler):
    """See :func:`.curves.multistep`."""

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        return curves.multistep(epoch, self.params.multistep_steps, self.params.levels())


@LevelScheduler.register("baseline")
class BaselineScheduler(LevelScheduler):
    """The target as soon as the warm-up epochs are over, frozen from the next epoch on."""

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        return self.target if epoch >= self.params.exponential_epochs()[0] else self.initial

    def _freeze_epoch(self) -> float:
        return min(self.params.freeze_epoch, self.params.exponential_epochs()[0] + 1)


@LevelScheduler.register("adaptive")
class AdaptiveScheduler(LevelScheduler):
    """Raises the level when it has been reached for some epochs: the only one that is no function of time."""

    STEP: ClassVar[float] = 0.05
    EPSILON: ClassVar[float] = 0.03

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._level = self.initial
        self._epochs_reached = 0

    def level_at(self, epoch: int, step: int = 0) -> float:
        """The current level."""
        return self._level

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """The first level; when it rises, training decides."""
        rising = (0, 0, f"rises by {self.STEP:g} when reached, up to {self.target:g}", self.initial)
        frozen = self._freeze_epoch()
        ends: list[Change] = [(math.ceil(frozen), 0, "frozen", None)] if frozen < epochs else []
        return [rising, *ends]

    def epoch_step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`. Waits for the device, to see what was reached."""
        trained = self._current_epoch >= 0
        BaseCompressionScheduler.epoch_step(self, next)
        if trained and not self.is_frozen:
            if self.controller.achieved_level() >= self._level - self.EPSILON:
                self._epochs_reached += 1
            if self._epochs_reached >= self.params.patience:
                self._epochs_reached = 0
                self._level = min(self._level + self.STEP, self.target)
        self._apply()

    def get_state(self) -> State:
        """The counters, the level, and for how many epochs it has been reached."""
        return {**super().get_state(), "level": self._level, "epochs_reached": self._epochs_reached}

    def load_state(self, state: State) -> None:
        """Set them."""
        super().load_state(state)
        self._level, self._epochs_reached = take(state, "level", "epochs_reached", of=type(self).__name__)
