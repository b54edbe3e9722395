"""Parameters of schedules."""

from pydantic import Field, field_validator

from coreai_opt.controllers.core.config import ConfigModel

__all__ = ["ScheduleParams"]


class ScheduleParams(ConfigModel):
    """What schedulers take. Algorithms add their own, and rename these to their keys.

    Fields:
        schedule: key of a scheduler.
        steps_per_epoch: optimizer steps in an epoch.
        update_per_optimizer_step: move the level at each step (polynomial and exponentials).
        power, concave: of the polynomial.
        patience: epochs for which the adaptive level has to be reached.
        multistep_steps: epochs at which the multistep level changes.
    """

    schedule: str
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
