"""Levels, from the formulas; counters."""

import math
from typing import Any

import pytest

from coreai_opt.controllers.algorithms.sparsity import SparsityParams
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler
from coreai_opt.controllers.schedules import curves
from coreai_opt.controllers.schedules.levels import LevelScheduler


class Recorder:
    """Stands for a controller."""

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.frozen_at: int | None = None
        self.achieved = 1.0

    def set_level(self, level: float) -> None:
        self.levels.append(level)

    def freeze(self) -> None:
        if self.frozen_at is None:
            self.frozen_at = len(self.levels)

    def achieved_level(self) -> float:
        return self.achieved


def scheduler(schedule: str, initial: float = 0.1, target: float = 0.5, **params: Any) -> Any:
    settings = SparsityParams(schedule=schedule, sparsity_target=target, **params)
    return LevelScheduler.resolve(schedule)(Recorder(), initial, target, settings)


@pytest.mark.parametrize("concave", [True, False])
def test_polynomial_by_epoch(concave: bool) -> None:
    tested = scheduler("polynomial", sparsity_target_epoch=4, power=3, concave=concave)
    for epoch in range(7):
        tested.epoch_step()
        share = min(epoch / 4, 1)
        golden = 0.5 - 0.4 * (1 - share) ** 3 if concave else 0.1 + 0.4 * share**3
        assert tested.controller.levels[-1] == pytest.approx(golden, abs=1e-15)


def test_polynomial_by_step_never_falls() -> None:
    tested = scheduler(
        "polynomial", sparsity_target_epoch=2, power=1, update_per_optimizer_step=True, steps_per_epoch=5
    )
    seen = []
    for _ in range(3):
        tested.epoch_step()
        for _ in range(5):
            tested.step()
            seen.append(tested.controller.levels[-1])
    golden = [0.1 + 0.4 * min(step / 10, 1) for step in range(15)]
    assert seen == pytest.approx(golden, abs=1e-15)
    assert tested.controller.levels == sorted(tested.controller.levels)


def test_exponential_density_decays_geometrically() -> None:
    tested = scheduler("exponential", sparsity_target_epoch=4)
    for _ in range(6):
        tested.epoch_step()
    ratio = (0.5 / 0.9) ** 0.25
    golden = [1 - 0.9 * ratio ** min(epoch, 4) for epoch in range(6)]
    assert tested.controller.levels == pytest.approx(golden, abs=1e-15)


@pytest.mark.parametrize(("initial", "target"), [(0.0, 1.0), (1.0, 1.0), (0.3, 0.3)])
def test_exponential_extremes(initial: float, target: float) -> None:
    levels = [curves.exponential(step / 4, initial, target) for step in range(5)]
    assert all(0 <= level <= 1 for level in levels)
    assert levels[-1] == pytest.approx(target)


def test_multistep_changes_at_its_epochs() -> None:
    tested = scheduler("multistep", multistep_steps=[1, 3], multistep_sparsity_levels=[0.1, 0.2, 0.6])
    for _ in range(5):
        tested.epoch_step()
    assert tested.controller.levels == [0.1, 0.2, 0.2, 0.6, 0.6]


@pytest.mark.parametrize(("initial", "target", "epochs"), [(0.0, 0.5, 8), (0.1, 0.6, 16), (0.2, 0.3, 5)])
def test_biased_exponential_goes_through_its_three_points(initial: float, target: float, epochs: int) -> None:
    def at(epoch: float) -> float:
        return curves.biased_exponential(epoch, initial, target, epochs)

    assert at(0) == pytest.approx(initial, abs=1e-12)
    assert at(epochs) == pytest.approx(target, abs=1e-12)
    assert at(epochs / 8) == pytest.approx(0.75 * target, abs=1e-12)
    # An exponential: equal steps shrink the distance to the asymptote by equal factors.
    a, b, c = at(epochs / 4), at(epochs / 2), at(3 * epochs / 4)
    assert (b - a) ** 2 == pytest.approx((at(epochs / 4) - at(0)) * (c - b), rel=1e-9)
    assert at(epochs + 5) == at(epochs)


def test_biased_exponential_needs_a_low_start() -> None:
    with pytest.raises(ValueError, match=r"below 5/7 of the target.*got 0.4 and 0.5"):
        curves.biased_exponential(0, 0.4, 0.5, 10)


def test_adaptive_rises_when_the_level_was_reached() -> None:
    tested = scheduler("adaptive", initial=0.4, patience=2)
    levels = []
    for achieved in (1.0, 0.38, 0.35, 0.38, 0.44, 0.43, 0.9, 0.9):
        tested.controller.achieved = achieved
        tested.epoch_step()
        levels.append(tested.level)
    # The first epoch has nothing to look back at; 0.35 is more than 0.03 short; two epochs have to do.
    assert levels == pytest.approx([0.4, 0.4, 0.4, 0.45, 0.45, 0.5, 0.5, 0.5])


def test_baseline_is_at_its_target_then_freezes() -> None:
    tested = scheduler("baseline")
    tested.epoch_step()
    tested.epoch_step()
    assert tested.controller.levels == [0.5]
    assert tested.controller.frozen_at == 1


def test_freezing_ends_the_updates() -> None:
    tested = scheduler("polynomial", sparsity_target_epoch=2, sparsity_freeze_epoch=3)
    for _ in range(6):
        tested.epoch_step()
    assert len(tested.controller.levels) == 3
    assert tested.controller.frozen_at == 3


def test_counters_start_before_the_first_and_jump() -> None:
    tested = BaseCompressionScheduler(steps_per_epoch=10)
    assert (tested.current_epoch, tested.current_step, tested.step_in_epoch) == (-1, -1, -1)
    tested.epoch_step()
    tested.step()
    assert (tested.current_epoch, tested.current_step, tested.step_in_epoch) == (0, 0, 0)
    tested.epoch_step(next=4)
    tested.step(next=43)
    assert (tested.current_epoch, tested.current_step, tested.step_in_epoch) == (4, 43, 3)
    with pytest.raises(ValueError, match=r"next step must be an integer"):
        tested.step(next=1.5)  # type: ignore[arg-type]


def test_a_step_in_mid_epoch_is_remembered() -> None:
    settings = {
        "sparsity_target_epoch": 4,
        "power": 1,
        "update_per_optimizer_step": True,
        "steps_per_epoch": 2,
    }
    first = scheduler("polynomial", 0.0, 0.8, **settings)
    first.epoch_step()
    first.epoch_step()
    first.step()
    second = scheduler("polynomial", 0.0, 0.8, **settings)
    second.load_state(first.get_state())
    for each in (first, second):
        each.step()
        assert each.level == pytest.approx(0.3)
        each.epoch_step()
        assert each.level == pytest.approx(0.4)


def test_a_level_by_step_needs_the_length_of_an_epoch() -> None:
    with pytest.raises(ValueError, match="give steps_per_epoch"):
        scheduler("polynomial", update_per_optimizer_step=True)
    for schedule in ("multistep", "adaptive", "baseline"):
        with pytest.raises(ValueError, match=f"'{schedule}' moves at epochs"):
            scheduler(schedule, update_per_optimizer_step=True, steps_per_epoch=2)


def test_share_of_nothing_is_everything() -> None:
    assert curves.share_of(0, 0) == 1.0
    assert math.isclose(curves.share_of(3, 4), 0.75)
