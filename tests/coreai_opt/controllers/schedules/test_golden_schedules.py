"""What every schedule asks for at each epoch and each of its steps: the formulas, written out in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from coreai_opt.controllers import CompressionStage, create_compressed_model

from ..support import configured, make_model

EPOCHS, STEPS = 7, 4
BY_STEP = {"update_per_optimizer_step": True, "steps_per_epoch": STEPS}
Formula = Callable[[int, int], float]
"""The level in an epoch at a step; of both the first is 0."""


def trace(*algorithms: dict[str, Any]) -> tuple[Any, np.ndarray, np.ndarray]:
    """The controller, its levels after each ``epoch_step``, and after each ``step``."""
    config = configured(*algorithms)
    config.init_args.train_loader = config.init_args.train_loader * 2  # of another length than STEPS
    controller, _ = create_compressed_model(make_model(), config)
    levels = np.full(EPOCHS, np.nan), np.full((EPOCHS, STEPS), np.nan)
    for epoch in range(EPOCHS):
        controller.scheduler.epoch_step()
        levels[0][epoch] = controller.level
        for step in range(STEPS):
            controller.scheduler.step()
            levels[1][epoch, step] = controller.level
    return controller, *levels


def check(algorithm: dict[str, Any], golden: Formula) -> Any:
    controller, at_epochs, at_steps = trace(algorithm)
    expected = np.array([[golden(epoch, step) for step in range(STEPS)] for epoch in range(EPOCHS)])
    np.testing.assert_allclose(at_epochs, expected[:, 0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(at_steps, expected, rtol=0, atol=1e-14)
    return controller


def sparsity(name: str, schedule: str, initial: float, target: float, **params: Any) -> dict[str, Any]:
    settings = {"schedule": schedule, "sparsity_target": target, **params}
    return {"algorithm": f"{name}_sparsity", "sparsity_init": initial, "params": settings}


def pruning(schedule: str, initial: float, target: float, **params: Any) -> dict[str, Any]:
    settings = {"schedule": schedule, "pruning_target": target, "prune_first_conv": True, **params}
    return {"algorithm": "filter_pruning", "pruning_init": initial, "params": settings}


def time(by_step: bool, epoch: int, step: int) -> float:
    return epoch + step / STEPS if by_step else epoch


def polynomial(initial: float, target: float, epochs: float, power: float, concave: bool) -> Any:
    def level(at: float) -> float:
        p = min(at / epochs, 1.0)
        return (
            target - (target - initial) * (1 - p) ** power
            if concave
            else initial + (target - initial) * p**power
        )

    return level


def exponential(initial: float, target: float, first: float, epochs: float) -> Any:
    def level(at: float) -> float:
        p = min(max((at - first) / epochs, 0.0), 1.0)
        return 1 - (1 - initial) * ((1 - target) / (1 - initial)) ** p

    return level


def biased(initial: float, target: float, first: float, epochs: float) -> Any:
    """``a * exp(-k * t) + b`` through three points; ``x = exp(-k * epochs / 8)`` is a polynomial's root."""
    # (target - initial) / (3/4 target - initial) = (x**8 - 1) / (x - 1)
    roots = np.roots([1] * 7 + [1 - (target - initial) / (0.75 * target - initial)])
    (x,) = (root.real for root in roots if abs(root.imag) < 1e-12 and 0 < root.real < 1)
    k = -8 * np.log(x) / epochs
    a = (target - initial) / (np.exp(-k * epochs) - 1)

    def level(at: float) -> float:
        t = min(max(at - first, 0.0), epochs)
        return float(a * np.exp(-k * t) + initial - a)

    return level


SPARSITIES = pytest.mark.parametrize("name", ["magnitude", "rb"])
BOTH = pytest.mark.parametrize("by_step", [False, True], ids=["by-epoch", "by-step"])


@SPARSITIES
@BOTH
@pytest.mark.parametrize("concave", [True, False], ids=["concave", "convex"])
@pytest.mark.parametrize("power", [None, 3.0])
def test_polynomial(name: str, by_step: bool, concave: bool, power: float | None) -> None:
    params = {"concave": concave, "sparsity_target_epoch": 5, **(BY_STEP if by_step else {})}
    params |= {} if power is None else {"power": power}
    level = polynomial(0.1, 0.6, 5, power or 0.9, concave)
    check(sparsity(name, "polynomial", 0.1, 0.6, **params), lambda e, i: level(time(by_step, e, i)))


def test_polynomial_by_default() -> None:
    controller = check({"algorithm": "magnitude_sparsity"}, lambda e, i: 0.5 - 0.5 * (1 - e / 90) ** 0.9)
    controller.scheduler.epoch_step(90)
    assert controller.level == 0.5


def test_polynomial_values() -> None:
    _, at_epochs, at_steps = trace(
        sparsity("magnitude", "polynomial", 0.0, 0.64, sparsity_target_epoch=2, power=2, **BY_STEP)
    )
    # 0.64 (1 - (1 - n/8)**2) = (16 n - n**2) / 100
    np.testing.assert_allclose(
        at_steps[:2].ravel(), [0, 0.15, 0.28, 0.39, 0.48, 0.55, 0.60, 0.63], atol=1e-15
    )
    np.testing.assert_allclose(at_epochs, [0, 0.48, *[0.64] * 5], atol=1e-15)


@SPARSITIES
@BOTH
def test_exponential(name: str, by_step: bool) -> None:
    params = {"sparsity_target_epoch": 5, **(BY_STEP if by_step else {})}
    level = exponential(0.1, 0.6, 0, 5)
    check(sparsity(name, "exponential", 0.1, 0.6, **params), lambda e, i: level(time(by_step, e, i)))


def test_exponential_values() -> None:
    _, at_epochs, at_steps = trace(sparsity("magnitude", "exponential", 0.0, 0.9375, sparsity_target_epoch=4))
    np.testing.assert_allclose(at_epochs, [0, 0.5, 0.75, 0.875, 0.9375, 0.9375, 0.9375], atol=1e-15)
    np.testing.assert_array_equal(at_steps, np.repeat(at_epochs[:, None], STEPS, axis=1))


def test_rb_sparsity_is_exponential_by_default() -> None:
    check({"algorithm": "rb_sparsity"}, lambda e, i: 1 - 0.5 ** (e / 90))


@SPARSITIES
@BOTH
def test_exponential_with_bias_of_sparsity(name: str, by_step: bool) -> None:
    params = {"sparsity_target_epoch": 5, **(BY_STEP if by_step else {})}
    level = biased(0.1, 0.6, 0, 5)
    check(
        sparsity(name, "exponential_with_bias", 0.1, 0.6, **params), lambda e, i: level(time(by_step, e, i))
    )


@SPARSITIES
def test_multistep(name: str) -> None:
    levels = [0.1, 0.3, 0.7]
    params = {"multistep_steps": [2, 5], "multistep_sparsity_levels": levels, "steps_per_epoch": STEPS}
    check(
        sparsity(name, "multistep", 0.0, 0.5, **params),
        lambda e, i: [0.1, 0.1, 0.3, 0.3, 0.3, 0.7, 0.7][e],
    )


def test_multistep_by_default() -> None:
    controller = check(sparsity("magnitude", "multistep", 0.0, 0.5), lambda e, i: 0.1)
    for epoch, level in ((89, 0.1), (90, 0.5), (91, 0.5)):
        controller.scheduler.epoch_step(epoch)
        assert controller.level == level


@pytest.mark.parametrize("patience", [1, 2])
def test_adaptive(patience: int) -> None:
    # Masks reach their level at once, so that every `patience` epochs another 0.05 are asked for.
    check(
        sparsity("magnitude", "adaptive", 0.3, 0.45, patience=patience),
        lambda e, i: min(0.3 + 0.05 * (e // patience), 0.45),
    )


def test_adaptive_waits_until_its_level_is_reached() -> None:
    # Nothing trains here: RB sparsity's masks stay open, and 0 of 0.3 are not reached.
    check(sparsity("rb", "adaptive", 0.3, 0.45), lambda e, i: 0.3)
    check(sparsity("rb", "adaptive", 0.02, 0.45), lambda e, i: 0.02 if e == 0 else 0.07)


@SPARSITIES
def test_baseline_of_sparsity(name: str) -> None:
    controller = check(sparsity(name, "baseline", 0.1, 0.6), lambda e, i: 0.6)
    assert controller.is_frozen


@pytest.mark.parametrize("schedule", ["polynomial", "exponential", "exponential_with_bias"])
def test_freezing_holds_the_level(schedule: str) -> None:
    level = {
        "polynomial": polynomial(0.1, 0.6, 5, 0.9, True),
        "exponential": exponential(0.1, 0.6, 0, 5),
        "exponential_with_bias": biased(0.1, 0.6, 0, 5),
    }[schedule]
    last = 2 + (STEPS - 1) / STEPS  # the step before epoch 3, with which the masks stay
    controller = check(
        sparsity(
            "magnitude", schedule, 0.1, 0.6, sparsity_target_epoch=5, sparsity_freeze_epoch=3, **BY_STEP
        ),
        lambda e, i: level(min(e + i / STEPS, last)),
    )
    assert controller.is_frozen


@BOTH
@pytest.mark.parametrize(
    ("schedule", "formula"), [("exponential", exponential), ("exponential_with_bias", biased)]
)
def test_exponentials_of_pruning(schedule: str, formula: Any, by_step: bool) -> None:
    # The target is reached after pruning_steps - 1 epochs of pruning.
    params = {"num_init_steps": 2, "pruning_steps": 5, **(BY_STEP if by_step else {})}
    level = formula(0.1, 0.6, 2, 4)
    check(
        pruning(schedule, 0.1, 0.6, **params),
        lambda e, i: level(time(by_step, e, i)) if e >= 2 else 0.1,
    )


def test_pruning_is_exponential_by_default() -> None:
    params = {"prune_first_conv": True}
    check({"algorithm": "filter_pruning", "params": params}, lambda e, i: 1 - 0.5 ** (e / 99))


def test_baseline_of_pruning() -> None:
    controller, at_epochs, _ = trace(pruning("baseline", 0.1, 0.6, num_init_steps=2))
    assert at_epochs.tolist() == [0.1, 0.1, *[0.6] * 5]
    controller.set_level(0.3)
    assert controller.level == 0.6  # frozen one epoch after it got there


def test_a_ranking_over_all_layers_does_not_move_by_step() -> None:
    with pytest.raises(ValueError, match="moves at optimizer steps excludes all_weights"):
        trace(pruning("exponential", 0.1, 0.6, all_weights=True, **BY_STEP))


@pytest.mark.parametrize(("activations", "weights"), [(0, 0), (1, 3), (4, 2), (0, 2)])
def test_staged_quantization(activations: int, weights: int) -> None:
    params = {"activations_quant_start_epoch": activations, "weights_quant_start_epoch": weights}
    controller, model = create_compressed_model(
        make_model(), configured({"algorithm": "quantization", "params": params})
    )
    for epoch in range(5):
        controller.scheduler.epoch_step()
        for _ in range(STEPS):
            controller.scheduler.step()
            on = epoch >= activations, epoch >= weights
            parts = (controller.activations, controller.weights)
            assert [{bool(each.fake_quant_enabled) for each in part.values()} for part in parts] == [
                {on[0]},
                {on[1]},
            ]
            assert (model.head.weight[0].unique().numel() < 128) == on[1]
            assert controller.compression_rate == (0.75 if on[1] else 0.0)
            none, some, full = CompressionStage
            assert controller.compression_stage() is (full if all(on) else some if any(on) else none)


@pytest.mark.parametrize("power", [3.0, 1.5])
def test_movement_thresholds(power: float) -> None:
    first, last, start, end = -0.8, 0.2, 1, 4
    params = {
        "warmup_start_epoch": start,
        "warmup_end_epoch": end,
        "init_importance_threshold": first,
        "final_importance_threshold": last,
        "importance_regularization_factor": 0.25,
        "power": power,
        "steps_per_epoch": STEPS,
    }
    controller, _ = create_compressed_model(
        make_model(), configured({"algorithm": "movement_sparsity", "params": params})
    )
    (mask,) = controller._masks.values()
    for epoch in range(6):
        controller.scheduler.epoch_step()
        for step in range(STEPS):
            controller.scheduler.step()
            share = min(max((epoch + step / STEPS - start) / (end - start), 0.0), 1.0)
            golden = last + (first - last) * (1 - share) ** power if epoch >= start else -np.inf
            assert float(mask.threshold) == pytest.approx(golden, rel=1e-6)
            loss = 0.25 * share * 0.5 if epoch < end else 0.0  # sigmoid(0) = 1/2
            assert float(controller.loss().detach()) == pytest.approx(loss, rel=1e-6)
