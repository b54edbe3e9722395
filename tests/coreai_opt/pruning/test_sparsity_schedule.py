"""Schedules: their values at the ends and between, updates at intervals, and what they refuse."""

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from coreai_opt.pruning import MagnitudePruner
from coreai_opt.pruning.config import (
    ConstantSparsitySchedule,
    CosineSparsitySchedule,
    ExponentialSparsitySchedule,
    MagnitudePrunerConfig,
    ModuleMagnitudePrunerConfig,
    MultiStepSparsitySchedule,
    PolynomialDecaySchedule,
    SparsityScheduleBase,
)

RAMPS = [PolynomialDecaySchedule, ExponentialSparsitySchedule, CosineSparsitySchedule]


def values(schedule, target, steps):
    """The sparsity at each step."""
    return [schedule.compute_sparsity(step, target) for step in range(steps)]


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
    assert type(schedule).model_validate(schedule.model_dump()) == schedule
    assert type(schedule).model_validate_json(schedule.model_dump_json()) == schedule


def test_a_dump_of_another_schedule_is_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        PolynomialDecaySchedule.model_validate(CosineSparsitySchedule(total_iters=3).model_dump())


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


def test_between_updates_the_sparsity_is_that_of_the_last_update():
    schedule = PolynomialDecaySchedule(begin_step=2, total_iters=9, update_frequency=4, initial_sparsity=0.1)
    found = [round(each, 6) for each in values(schedule, 0.8, 14)]
    assert found == [0.1] * 6 + [0.7125] * 4 + [0.8] * 4
    with pytest.raises(TypeError, match="positional arguments"):
        schedule.compute_sparsity(3, 0.8, 0.1)


class Steepening(SparsityScheduleBase):
    """A schedule in the form of 0.3.0, which grows by a tenth of what is left at each step."""

    def compute_sparsity(self, step_count, target_sparsity, prev_sparsity):
        return 0.0 if step_count == 0 else prev_sparsity + (target_sparsity - prev_sparsity) / 10


class WithDefault(SparsityScheduleBase):
    def compute_sparsity(self, step_count, target_sparsity, prev_sparsity=None):
        return 0.25 if prev_sparsity is None else 1.0


def prepared(schedule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    config = ModuleMagnitudePrunerConfig(sparsity_schedule=schedule)
    pruner = MagnitudePruner(model, MagnitudePrunerConfig(global_config=config))
    pruner.prepare((torch.zeros(1, 16),))
    return model, pruner


def test_schedules_with_three_arguments_work_and_warn():
    with pytest.warns(DeprecationWarning, match=r"Steepening\.compute_sparsity takes.*'prev_sparsity'"):
        model, pruner = prepared(Steepening())
    expected = 0.0
    for _ in range(3):
        expected += (0.5 - expected) / 10
        with pytest.warns(DeprecationWarning, match="Steepening"):
            pruner.step()
        assert model[0].parametrizations.weight[0].sparsity == expected
    with pytest.warns(DeprecationWarning, match="Steepening"):
        resumed, _ = prepared(Steepening())
    with pytest.warns(DeprecationWarning, match="Steepening"):
        resumed.load_state_dict(model.state_dict())
    assert resumed[0].parametrizations.weight[0].sparsity == expected


def test_a_third_argument_with_a_default_is_left_out(recwarn):
    model, pruner = prepared(WithDefault())
    pruner.step()
    assert model[0].parametrizations.weight[0].sparsity == 0.25
    assert not [each for each in recwarn if each.category is DeprecationWarning]


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
