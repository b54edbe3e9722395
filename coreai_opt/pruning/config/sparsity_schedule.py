"""How much is pruned at which training step. Schedules are functions of the step, and keep no state."""

import bisect
import functools
import inspect
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

from pydantic import Field, model_validator

from coreai_opt._utils.registry_utils import RegisteredConfig

__all__ = [
    "ConstantSparsitySchedule",
    "CosineSparsitySchedule",
    "ExponentialSparsitySchedule",
    "MultiStepSparsitySchedule",
    "PolynomialDecaySchedule",
    "SparsityScheduleBase",
]


class SparsityScheduleBase(RegisteredConfig):
    """Base of the schedules. Registered under a key, a schedule can be named as ``{"type": key, ...}``."""

    @abstractmethod
    def compute_sparsity(self, step_count: int, target_sparsity: float) -> float:
        """The sparsity at a step.

        Args:
            step_count: steps done.
            target_sparsity: the sparsity to reach.
        """

    def _sparsity_after(self, step_count: int, target_sparsity: float, previous: float | None) -> float:
        """What :meth:`compute_sparsity` gives at a step, in whichever form a subclass has defined it.

        Args:
            step_count: steps done.
            target_sparsity: the sparsity to reach.
            previous: the sparsity before, which definitions in the form of 0.3.0 take as a third argument.
                None to find it, from the first step on.
        """
        third = _third_argument(type(self).compute_sparsity)
        if third is None:
            return self.compute_sparsity(step_count, target_sparsity)
        warnings.warn(
            f"{type(self).__name__}.compute_sparsity takes the sparsity before as a third argument, "
            f"{third!r}. That form is deprecated: define compute_sparsity(self, step_count, target_sparsity)",
            DeprecationWarning,
            stacklevel=2,
        )
        compute: Any = self.compute_sparsity
        if previous is not None:
            return float(compute(step_count, target_sparsity, previous))
        sparsity = target_sparsity
        for step in range(step_count + 1):
            sparsity = float(compute(step, target_sparsity, sparsity))
        return sparsity


@functools.cache
def _third_argument(compute_sparsity: Callable[..., float]) -> str | None:
    """The name of a third argument that a definition requires besides ``self``; None if it requires none."""
    parameters = list(inspect.signature(compute_sparsity).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) != 4 or parameters[3].kind not in positional:
        return None
    return parameters[3].name if parameters[3].default is inspect.Parameter.empty else None


@SparsityScheduleBase.register("constant")
class ConstantSparsitySchedule(SparsityScheduleBase):
    """Nothing before ``begin_step``, the target from there on."""

    begin_step: int = Field(default=0, ge=0)

    def compute_sparsity(self, step_count: int, target_sparsity: float) -> float:
        """See the base."""
        return target_sparsity if step_count >= self.begin_step else 0.0


class _Ramp(SparsityScheduleBase):
    """From ``initial_sparsity`` at ``begin_step`` to the target, in ``total_iters`` steps.

    Both ends count: the last step is ``begin_step + total_iters - 1``. With an ``update_frequency`` of f, the
    sparsity changes at every f-th step only, and reaches the target at the last of those. In between it is
    that of the last such step.
    """

    begin_step: int = Field(default=0, ge=0)
    total_iters: int = Field(gt=0)
    initial_sparsity: float = Field(default=0.0, ge=0.0, le=1.0)
    update_frequency: int = Field(default=1, gt=0)

    def _interpolate(self, progress: float, target_sparsity: float) -> float:
        """The sparsity at ``progress``, which goes from 0 to 1."""
        raise NotImplementedError

    def compute_sparsity(self, step_count: int, target_sparsity: float) -> float:
        """See the base."""
        elapsed = step_count - self.begin_step
        if elapsed < 0:
            return self.initial_sparsity
        if elapsed >= self.total_iters:
            return target_sparsity
        updates, last = elapsed // self.update_frequency, (self.total_iters - 1) // self.update_frequency
        return self._interpolate(updates / max(1, last), target_sparsity)


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

    def compute_sparsity(self, step_count: int, target_sparsity: float) -> float:
        """See the base."""
        passed = bisect.bisect_right(self.milestones, step_count)
        return self.fractions[passed - 1] * target_sparsity if passed else self.initial_sparsity
