"""Schedulers that only count steps and epochs, and the one that steps several together."""

from collections.abc import Sequence

from coreai_opt.controllers.core.api import CompressionScheduler, State
from coreai_opt.controllers.core.state import take

__all__ = ["BaseCompressionScheduler", "Change", "CompositeCompressionScheduler", "StubScheduler", "place_of"]


Change = tuple[int, int, str, float | None]
"""Epoch, step of the epoch, what changes, and the level from then on if there is one."""


def place_of(step: int, steps_per_epoch: int | None) -> tuple[int, int]:
    """Epoch and step of the epoch of an optimizer step that is counted over all epochs.

    Raises:
        ValueError: nobody told how many steps an epoch has.
    """
    if step and not steps_per_epoch:
        raise ValueError(
            "a schedule counts steps: give the number of steps in an epoch, or register a data loader with "
            "register_default_init_args"
        )
    return divmod(step, steps_per_epoch) if steps_per_epoch else (0, 0)


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

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """What changes when, in a run from the beginning: nothing.

        Args:
            epochs: of the run.
            steps_per_epoch: optimizer steps in an epoch, where known.
        """
        return []

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
