"""Parameters of schedules."""

from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from coreai_opt.controllers.core.config import ConfigModel
from coreai_opt.pruning.config.sparsity_schedule import SparsityScheduleBase

__all__ = ["PrunersSchedule", "Schedule", "ScheduleParams"]

# A schedule of the pruner, which counts optimizer steps.
PrunersSchedule = Annotated[
    SerializeAsAny[SparsityScheduleBase], BeforeValidator(SparsityScheduleBase.maybe_build_from_dict)
]
Schedule = str | PrunersSchedule


class ScheduleParams(ConfigModel):
    """What schedulers take. Algorithms add their own, and rename these to their keys.

    Fields:
        schedule: key of a scheduler; or a schedule of the pruner, itself or as ``{"type": key, ...}``.
        steps_per_epoch: optimizer steps in an epoch.
        update_per_optimizer_step: move the level at each step (polynomial and exponentials).
        power, concave: of the polynomial.
        patience: epochs for which the adaptive level has to be reached.
        multistep_steps: epochs at which the multistep level changes.
    """

    schedule: Schedule
    steps_per_epoch: int | None = Field(default=None, gt=0)
    update_per_optimizer_step: bool = False
    power: float = Field(default=0.9, gt=0)
    concave: bool = True
    patience: int = Field(default=1, ge=1)
    multistep_steps: list[int] = Field(default_factory=lambda: [90])

    @field_validator("multistep_steps")
    @classmethod
    def _ascending(cls, steps: list[int]) -> list[int]:
        if steps != sorted(set(steps)):
            raise ValueError(f"multistep_steps must ascend; got {steps}")
        return steps

    @property
    def has_own_freeze_epoch(self) -> bool:
        """Whether the configuration says when nothing changes any more."""
        return False

    @property
    def target_epoch(self) -> float:
        """Epoch at which a polynomial is at its target."""
        raise NotImplementedError

    @property
    def freeze_epoch(self) -> float:
        """Epoch from which nothing changes any more."""
        raise NotImplementedError

    def exponential_epochs(self) -> tuple[float, float]:
        """First epoch of an exponential, and the number of epochs until its target."""
        raise NotImplementedError

    def levels(self) -> list[float]:
        """Levels of a multistep schedule."""
        raise NotImplementedError
