"""The schedules of pruning simulators, which count optimizer steps, as schedules of controllers."""

import math

from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler, Change
from coreai_opt.controllers.schedules.levels import LevelScheduler
from coreai_opt.pruning.config.sparsity_schedule import SparsityScheduleBase

__all__ = ["SimulatorScheduler", "scheduler_class_of"]


def scheduler_class_of(schedule: str | SparsityScheduleBase) -> type[LevelScheduler]:
    """The class of the scheduler that a configuration asks for. KeyError for an unknown key."""
    return LevelScheduler.resolve(schedule) if isinstance(schedule, str) else SimulatorScheduler


class SimulatorScheduler(LevelScheduler):
    """A :class:`SparsityScheduleBase` of the pruner, toward the target of the algorithm.

    The level at the scheduler's n-th ``step()`` is the schedule's after n - 1 steps: the same as that of a
    pruner which steps behind the optimizer. The level at the start is the schedule's own.
    """

    @property
    def schedule(self) -> SparsityScheduleBase:
        """The pruner's schedule."""
        found = self.params.schedule
        assert isinstance(found, SparsityScheduleBase)
        return found

    @property
    def level(self) -> float:
        """See :class:`LevelScheduler`."""
        return self._level_after(max(self._current_step, 0))

    def level_at(self, epoch: int, step: int = 0) -> float:
        """See :class:`LevelScheduler`. ValueError if nobody told how many steps an epoch has."""
        return self._level_after(max(epoch, 0) * self._epoch_length(None) + step)

    def step(self, next: int | None = None) -> None:
        """See :class:`CompressionScheduler`."""
        BaseCompressionScheduler.step(self, next)
        if not self.is_frozen:
            self.controller.set_level(self.level)

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """The levels at the epochs' first and last steps."""
        changes: list[Change] = []
        length = self._epoch_length(steps_per_epoch)
        for epoch in range(epochs):
            if epoch >= self._freeze_epoch():
                return [*changes, (epoch, 0, "frozen", None)]
            for step in sorted({0, length - 1}):
                level = self._level_after(epoch * length + step)
                if not changes or level != changes[-1][3]:
                    changes.append((epoch, step, "level", level))
        return changes

    def _freeze_epoch(self) -> float:
        # The epoch that is the default is another schedule's end.
        return self.params.freeze_epoch if self.params.has_own_freeze_epoch else math.inf

    def _level_after(self, steps: int) -> float:
        return self.schedule._sparsity_after(steps, self.target, None)

    def _epoch_length(self, steps_per_epoch: int | None) -> int:
        length = self._steps_per_epoch or steps_per_epoch
        if not length:
            raise ValueError(
                f"{self.schedule!r} counts steps: give steps_per_epoch in the algorithm's params, or "
                f"register a data loader with register_default_init_args"
            )
        return length
