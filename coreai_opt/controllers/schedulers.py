"""Schedulers: counters of steps and epochs, and the levels that algorithms get from them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from coreai_opt._utils.registry_utils import ClassRegistryMixin
from coreai_opt.controllers import schedules
from coreai_opt.controllers.api import CompressionScheduler, State
from coreai_opt.controllers.config import ScheduleParams
from coreai_opt.controllers.state import take

__all__ = [
    "AdaptiveScheduler",
    "BaseCompressionScheduler",
    "BaselineScheduler",
    "BiasedExponentialScheduler",
    "CompositeCompressionScheduler",
    "ExponentialScheduler",
    "FollowsLevel",
    "LevelScheduler",
    "MultistepScheduler",
    "PolynomialScheduler",
    "StubScheduler",
]


class BaseCompressionScheduler(CompressionScheduler):
    """Counts steps and epochs, and nothing else.

    Args:
        steps_per_epoch: optimizer steps in an epoch, where known. Needed only by schedules that move at each
            step, and to know the place in its epoch of a step that is jumped to.
    """

    def __init__(self, steps_per_epoch: int | None = None) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._current_step = -1
        self._current_epoch = -1
        self._step_in_epoch = -1

    @property
    def current_step(self) -> int:
        """See :class:`CompressionScheduler`."""
        return self._current_step

    @property
    def current_epoch(self) -> int:
        """See :class:`CompressionScheduler`."""
        return self._current_epoch

    @property
    def step_in_epoch(self) -> int:
        """Index in its epoch of the current step; -1 before the epoch's first."""
        return self._step_in_epoch

    def step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        if next is None:
            self._current_step += 1
            self._step_in_epoch += 1
            return
        _check_index("step", next)
        start = self._current_step - self._step_in_epoch
        self._current_step = next
        self._step_in_epoch = next % self._steps_per_epoch if self._steps_per_epoch else max(next - start, 0)

    def epoch_step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        if next is not None:
            _check_index("epoch", next)
        self._current_epoch = self._current_epoch + 1 if next is None else next
        self._step_in_epoch = -1

    def get_state(self) -> State:
        """The counters."""
        return {
            "current_step": self._current_step,
            "current_epoch": self._current_epoch,
            "step_in_epoch": self._step_in_epoch,
        }

    def load_state(self, state: State) -> None:
        """Set the counters."""
        self._current_step, self._current_epoch, self._step_in_epoch = take(
            state, "current_step", "current_epoch", "step_in_epoch", of=type(self).__name__
        )


def _check_index(what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise ValueError(f"the next {what} must be an integer from -1 on, or None; got {value!r}")


class StubScheduler(BaseCompressionScheduler):
    """Counts on where another scheduler stopped."""

    @classmethod
    def replacing(cls, other: CompressionScheduler) -> "StubScheduler":
        """A stub with the counters of ``other``."""
        stub = cls(getattr(other, "_steps_per_epoch", None))
        stub._current_step, stub._current_epoch = other.current_step, other.current_epoch
        stub._step_in_epoch = getattr(other, "step_in_epoch", -1)
        return stub


class CompositeCompressionScheduler(BaseCompressionScheduler):
    """Steps the schedulers of several algorithms together.

    Args:
        schedulers: in the order in which they step.
    """

    def __init__(self, schedulers: Sequence[CompressionScheduler]) -> None:
        super().__init__()
        self.schedulers = tuple(schedulers)

    def step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        super().step(next)
        for scheduler in self.schedulers:
            scheduler.step(next)

    def epoch_step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        super().epoch_step(next)
        for scheduler in self.schedulers:
            scheduler.epoch_step(next)

    def get_state(self) -> State:
        """The counters; and the states in the order of the schedulers."""
        return {**super().get_state(), "schedulers": [each.get_state() for each in self.schedulers]}

    def load_state(self, state: State) -> None:
        """Load them in the same order."""
        (states,) = take(state, "schedulers", of="the composite scheduler")
        super().load_state(state)
        for scheduler, its in zip(self.schedulers, states, strict=True):
            scheduler.load_state(its)


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
    """:func:`.schedules.polynomial`; the progress is ``(epoch + step / steps_per_epoch) / target epoch``."""

    per_step = True

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        progress = schedules.share_of(self._time(epoch, step), self.params.target_epoch)
        return schedules.polynomial(
            progress, self.initial, self.target, self.params.power, self.params.concave
        )


@LevelScheduler.register("exponential")
class ExponentialScheduler(LevelScheduler):
    """See :func:`schedules.exponential`."""

    per_step = True

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        first, count = self.params.exponential_epochs()
        if epoch < first:
            return self.initial
        progress = schedules.share_of(self._time(epoch, step) - first, count)
        return schedules.exponential(progress, self.initial, self.target)


@LevelScheduler.register("exponential_with_bias")
class BiasedExponentialScheduler(LevelScheduler):
    """See :func:`schedules.biased_exponential`."""

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
        return schedules.biased_exponential(time, self.initial, self.target, count)


@LevelScheduler.register("multistep")
class MultistepScheduler(LevelScheduler):
    """See :func:`schedules.multistep`."""

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`."""
        return schedules.multistep(epoch, self.params.multistep_steps, self.params.levels())


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
