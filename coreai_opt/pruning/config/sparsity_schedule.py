"""How much is pruned at which training step. Schedules are functions of the step, and keep no state."""

import bisect
import math
from abc import abstractmethod
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from coreai_opt._utils.registry_utils import ConfigRegistryMixin

__all__ = [
    "ConstantSparsitySchedule",
    "CosineSparsitySchedule",
    "ExponentialSparsitySchedule",
    "MultiStepSparsitySchedule",
    "PolynomialDecaySchedule",
    "SparsityScheduleBase",
]


class SparsityScheduleBase(BaseModel, ConfigRegistryMixin):
    """Base of the schedules. Registered under a key, a schedule can be named as ``{"type": key, ...}``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """The sparsity at a step.

        Args:
            step_count: steps done.
            target_sparsity: the sparsity to reach.
            prev_sparsity: the sparsity before, which stays between two updates.
        """

    @model_serializer
    def _serialize_model(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in type(self).model_fields}
        for key, registered in SparsityScheduleBase.REGISTRY.items():
            if registered is type(self):
                data["type"] = key
        return data


@SparsityScheduleBase.register("constant")
class ConstantSparsitySchedule(SparsityScheduleBase):
    """Nothing before ``begin_step``, the target from there on."""

    begin_step: int = Field(default=0, ge=0)

    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """See the base."""
        return target_sparsity if step_count >= self.begin_step else 0.0


class _Ramp(SparsityScheduleBase):
    """From ``initial_sparsity`` at ``begin_step`` to the target, in ``total_iters`` steps.

    Both ends count: the last step is ``begin_step + total_iters - 1``. With an ``update_frequency`` of f, the
    sparsity changes at every f-th step only, and reaches the target at the last of those. In between it is
    the one before.
    """

    begin_step: int = Field(default=0, ge=0)
    total_iters: int = Field(gt=0)
    initial_sparsity: float = Field(default=0.0, ge=0.0, le=1.0)
    update_frequency: int = Field(default=1, gt=0)

    def _interpolate(self, progress: float, target_sparsity: float) -> float:
        """The sparsity at ``progress``, which goes from 0 to 1."""
        raise NotImplementedError

    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """See the base.

        Raises:
            ValueError: the step is between two updates, and ``prev_sparsity`` is not given.
        """
        elapsed = step_count - self.begin_step
        if elapsed < 0:
            return self.initial_sparsity
        if elapsed >= self.total_iters:
            return target_sparsity
        if elapsed % self.update_frequency:
            if prev_sparsity is None:
                raise ValueError(
                    f"step {step_count} is between two updates (update_frequency={self.update_frequency}): "
                    f"prev_sparsity must be given"
                )
            return prev_sparsity
        last_update = (self.total_iters - 1) // self.update_frequency * self.update_frequency
        return self._interpolate(elapsed / max(1, last_update), target_sparsity)


@SparsityScheduleBase.register("polynomial_decay")
class PolynomialDecaySchedule(_Ramp):
    """target + (initial - target) * (1 - progress) ** power.

    Cubic by default, as in Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878).
    """

    power: float = Field(default=3.0, gt=0)

    def _interpolate(self, progress: float, target_sparsity: float) -> float:
        return target_sparsity + (self.initial_sparsity - target_sparsity) * (1 - progress) ** self.power


@SparsityScheduleBase.register("exponential")
class ExponentialSparsitySchedule(_Ramp):
    """The density falls by the same factor at each step, from 1 - initial to 1 - target.

    Toward a target of 1, which no factor reaches, everything is pruned at the end alone.
    """

    def _interpolate(self, progress: float, target_sparsity: float) -> float:
        if progress == 0 or progress == 1 or self.initial_sparsity == 1:
            return target_sparsity if progress == 1 else self.initial_sparsity
        density = 1 - self.initial_sparsity
        return 1 - density * ((1 - target_sparsity) / density) ** progress


@SparsityScheduleBase.register("cosine")
class CosineSparsitySchedule(_Ramp):
    """Half a cosine wave, flat at both ends: target + (initial - target) * (1 + cos(pi * progress)) / 2."""

    def _interpolate(self, progress: float, target_sparsity: float) -> float:
        return (
            target_sparsity
            + (self.initial_sparsity - target_sparsity) * (1 + math.cos(math.pi * progress)) / 2
        )


@SparsityScheduleBase.register("multi_step")
class MultiStepSparsitySchedule(SparsityScheduleBase):
    """A level from each milestone on.

    Fields:
        milestones: steps, ascending, at which the level changes.
        fractions: for each milestone, the share of the target sparsity from there on.
        initial_sparsity: before the first milestone.
    """

    milestones: tuple[int, ...] = Field(min_length=1)
    fractions: tuple[float, ...] = Field(min_length=1)
    initial_sparsity: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if len(self.fractions) != len(self.milestones):
            raise ValueError(
                f"fractions must have one entry per milestone, {len(self.milestones)}; "
                f"got {len(self.fractions)}"
            )
        if self.milestones[0] < 0 or any(
            a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)
        ):
            raise ValueError(f"milestones must be ascending steps from 0 on, got {self.milestones}")
        if not all(0 <= each <= 1 for each in self.fractions):
            raise ValueError(f"fractions must be in [0, 1], got {self.fractions}")
        return self

    def compute_sparsity(
        self, step_count: int, target_sparsity: float, prev_sparsity: float | None = None
    ) -> float:
        """See the base."""
        passed = bisect.bisect_right(self.milestones, step_count)
        return self.fractions[passed - 1] * target_sparsity if passed else self.initial_sparsity
