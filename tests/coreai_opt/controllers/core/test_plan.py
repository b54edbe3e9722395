"""What a run will do, told before it starts: the same as what it then does."""

from pathlib import Path
from typing import Any

import pytest

from coreai_opt.controllers import create_compressed_model

from ..support import configured, make_model

POLYNOMIAL = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {"sparsity_target": 0.6, "sparsity_target_epoch": 3, "sparsity_freeze_epoch": 5},
}
BY_STEP = {
    **POLYNOMIAL,
    "params": {**POLYNOMIAL["params"], "update_per_optimizer_step": True, "steps_per_epoch": 3},
}
MULTISTEP = {
    "algorithm": "magnitude_sparsity",
    "params": {"schedule": "multistep", "multistep_steps": [2], "multistep_sparsity_levels": [0.1, 0.5]},
}
STAGED = {
    "algorithm": "quantization",
    "params": {"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 2},
}


@pytest.mark.parametrize("algorithm", [POLYNOMIAL, BY_STEP, MULTISTEP])
def test_the_levels_are_those_of_the_run(algorithm: dict[str, Any]) -> None:
    controller, _ = create_compressed_model(make_model(), configured(algorithm))
    plan = controller.plan(7, 3)
    assert controller.scheduler.current_epoch == -1  # planning moves nothing
    levels = {(each.epoch, each.step): each.level for each in plan.changes if each.what == "level"}
    frozen = [each.epoch for each in plan.changes if each.what == "frozen"]
    for epoch in range(7):
        controller.scheduler.epoch_step()
        for step in range(3):
            controller.scheduler.step()
            if (epoch, step) in levels:
                assert controller.level == levels[epoch, step]
        assert controller.is_frozen == bool(frozen and epoch >= frozen[0])
    assert levels
    assert controller.level == list(levels.values())[-1]


def test_several_algorithms_in_the_order_of_time() -> None:
    controller, _ = create_compressed_model(make_model(), configured(POLYNOMIAL, STAGED))
    plan = controller.plan(4)
    assert [(each.epoch, each.algorithm, each.what) for each in plan.changes if each.level is None] == [
        (1, "quantization", "activations quantized"),
        (2, "quantization", "weights quantized"),
    ]
    times = [(each.epoch, each.step) for each in plan.changes]
    assert times == sorted(times)
    assert "activations quantized" in str(plan)
    assert "####" in plan.to_str()
    assert plan.to_dict()["epochs"] == 4


def test_movement_pruning_and_the_adaptive_schedule() -> None:
    movement = {
        "algorithm": "movement_sparsity",
        "params": {"warmup_start_epoch": 1, "warmup_end_epoch": 3, "importance_regularization_factor": 0.1,
                   "enable_structured_masking": False},
    }  # fmt: skip
    controller, _ = create_compressed_model(make_model(), configured(movement))
    assert [each.epoch for each in controller.plan(5).changes] == [1, 2, 3]
    assert controller.plan(5).changes[-1].what == "masks fixed"
    adaptive = {
        "algorithm": "magnitude_sparsity",
        "params": {"schedule": "adaptive", "sparsity_freeze_epoch": 2},
    }
    controller, _ = create_compressed_model(make_model(), configured(adaptive))
    assert [each.epoch for each in controller.plan(5).changes] == [0, 2]


def test_bad_numbers() -> None:
    controller, _ = create_compressed_model(make_model(), configured(POLYNOMIAL))
    for arguments in ((0,), (3, -1), (2.5,)):
        with pytest.raises(ValueError, match="must be a positive integer"):
            controller.plan(*arguments)


def test_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    controller, _ = create_compressed_model(make_model(), configured(POLYNOMIAL, STAGED))
    controller.plan(4).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
