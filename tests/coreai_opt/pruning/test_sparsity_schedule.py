"""Schedules: their values at the ends and between, updates at intervals, and what they refuse."""

import itertools
import math

import pytest
from pydantic import ValidationError

from coreai_opt.pruning.config import (
    ConstantSparsitySchedule,
    CosineSparsitySchedule,
    ExponentialSparsitySchedule,
    MultiStepSparsitySchedule,
    PolynomialDecaySchedule,
    SparsityScheduleBase,
)

RAMPS = [PolynomialDecaySchedule, ExponentialSparsitySchedule, CosineSparsitySchedule]


def values(schedule, target, steps):
    """The sparsity at each step, each update knowing the one before."""
    found, previous = [], None
    for step in range(steps):
        previous = schedule.compute_sparsity(step, target, previous)
        found.append(previous)
    return found


def test_registry():
    assert SparsityScheduleBase.list_registry_keys() == {
        "constant",
        "cosine",
        "exponential",
        "multi_step",
        "polynomial_decay",
    }


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSparsitySchedule(begin_step=3),
        MultiStepSparsitySchedule(milestones=(1, 5), fractions=(0.5, 1.0)),
        *(ramp(total_iters=9, begin_step=2, update_frequency=3, initial_sparsity=0.1) for ramp in RAMPS),
    ],
    ids=repr,
)
def test_a_dump_gives_the_same_schedule(schedule):
    assert SparsityScheduleBase.maybe_build_from_dict(schedule.model_dump()) == schedule


def test_constant():
    assert values(ConstantSparsitySchedule(begin_step=2), 0.7, 4) == [0, 0, 0.7, 0.7]


def test_polynomial():
    found = values(PolynomialDecaySchedule(total_iters=5), 0.7, 7)
    expected = [0.7 * (1 - (1 - step / 4) ** 3) for step in range(5)] + [0.7, 0.7]
    assert found == pytest.approx(expected, rel=1e-12)


def test_exponential_density_falls_by_a_constant_factor():
    found = values(ExponentialSparsitySchedule(total_iters=6, initial_sparsity=0.2), 0.9, 8)
    density = [1 - sparsity for sparsity in found]
    factors = [b / a for a, b in itertools.pairwise(density[:6])]
    assert factors == pytest.approx([(0.1 / 0.8) ** 0.2] * 5)
    assert found[0] == 0.2
    assert found[5:] == [0.9] * 3


@pytest.mark.parametrize("initial", [0.0, 0.5, 1.0])
def test_exponential_to_everything(initial):
    found = values(ExponentialSparsitySchedule(total_iters=3, initial_sparsity=initial), 1.0, 4)
    assert all(0 <= each <= 1 for each in found)
    assert found[2:] == [1, 1]


def test_cosine():
    found = values(CosineSparsitySchedule(total_iters=5, initial_sparsity=0.2), 0.8, 6)
    assert found == pytest.approx([0.5 - 0.3 * math.cos(math.pi * step / 4) for step in range(5)] + [0.8])


def test_multi_step():
    schedule = MultiStepSparsitySchedule(milestones=(1, 3), fractions=(0.5, 1.0), initial_sparsity=0.1)
    assert values(schedule, 0.8, 5) == [0.1, 0.4, 0.4, 0.8, 0.8]


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("initial", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("total", [1, 2, 10, 11])
@pytest.mark.parametrize("frequency", [1, 3, 20])
def test_ramps_go_one_way_from_end_to_end(ramp, begin, initial, total, frequency):
    schedule = ramp(begin_step=begin, initial_sparsity=initial, total_iters=total, update_frequency=frequency)
    found = values(schedule, 0.6, begin + total + 3)
    assert found[: begin + 1] == [initial] * (begin + 1)
    assert found[begin + total :] == [0.6] * 3
    changes = [b - a for a, b in itertools.pairwise(found)]
    assert all(change * (0.6 - initial) >= 0 for change in changes)
    last = (total - 1) // frequency * frequency
    for step, change in enumerate(changes, start=1):
        elapsed = step - begin
        if change:
            assert elapsed == total or elapsed % frequency == 0
    if last:
        assert found[begin + last] == pytest.approx(0.6, abs=1e-12)


def test_between_updates_the_last_sparsity_is_needed():
    schedule = PolynomialDecaySchedule(total_iters=9, update_frequency=4)
    assert schedule.compute_sparsity(3, 0.5, 0.123) == 0.123
    with pytest.raises(ValueError, match=r"step 3 is between two updates.*prev_sparsity"):
        schedule.compute_sparsity(3, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PolynomialDecaySchedule(), "Field required"),
        (lambda: PolynomialDecaySchedule(total_iters=0), "greater than 0"),
        (lambda: PolynomialDecaySchedule(total_iters=5, power=0), "greater than 0"),
        (lambda: CosineSparsitySchedule(total_iters=5, begin_step=-1), "greater than or equal to 0"),
        (lambda: ExponentialSparsitySchedule(total_iters=5, initial_sparsity=1.1), "less than or equal to 1"),
        (lambda: ExponentialSparsitySchedule(total_iters=5, power=2), "Extra inputs"),
        (lambda: MultiStepSparsitySchedule(milestones=(3, 3), fractions=(0.1, 1)), "must be ascending"),
        (lambda: MultiStepSparsitySchedule(milestones=(-1,), fractions=(1,)), "steps from 0 on"),
        (lambda: MultiStepSparsitySchedule(milestones=(1,), fractions=(0.1, 1)), "one entry per milestone"),
        (
            lambda: MultiStepSparsitySchedule(milestones=(1,), fractions=(1.1,)),
            r"must be in \[0, 1\]",
        ),
    ],
)
def test_invalid_schedules(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_schedules_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        ConstantSparsitySchedule().begin_step = 1
