from typing import Any

import pytest
import torch

from coreai_opt.controllers import CompressionStage, create_compressed_model

from ..support import Run, check_compiles, check_no_waits, configured, make_model


def movement(**more: Any) -> dict[str, Any]:
    params = {"warmup_start_epoch": 1, "warmup_end_epoch": 2, "importance_regularization_factor": 0.5, **more}
    return {"algorithm": "movement_sparsity", "params": params}


def test_the_threshold_rises_during_warm_up() -> None:
    config = configured(movement(warmup_start_epoch=1, warmup_end_epoch=3))
    controller, _ = create_compressed_model(make_model(), config)
    seen = []
    for _ in range(3):
        controller.scheduler.epoch_step()
        for _ in range(3):
            controller.scheduler.step()
            seen.append(float(controller._masks["head"].threshold))
    golden = [float("-inf")] * 3 + [-1 * (1 - step / 6) ** 3 for step in range(6)]
    assert seen == pytest.approx(golden)


def test_the_gradients_are_those_of_movement_pruning() -> None:
    controller, model = create_compressed_model(make_model(), configured(movement()))
    mask = controller._masks["head"]
    with torch.no_grad():
        mask.scores.normal_()
        mask.threshold.fill_(0.0)
    weight = model.head.parametrizations.weight.original
    grad = torch.randn_like(weight)
    model.head.weight.backward(grad)
    torch.testing.assert_close(mask.scores.grad, grad * weight.detach())
    torch.testing.assert_close(weight.grad, grad * (mask.scores > 0))


def test_the_loss_is_the_mean_probability() -> None:
    controller, _ = create_compressed_model(make_model(), configured(movement(warmup_end_epoch=3)))
    assert float(controller.loss()) == 0
    controller.scheduler.epoch_step(2)
    assert float(controller.loss().detach()) == pytest.approx(0.5 * 0.5 * 0.5)


def test_masks_are_fixed_after_warm_up() -> None:
    run = Run(configured(movement()))
    stages = [run.controller.compression_stage()]
    for until in (1, 4, 7):
        run.train(until)
        stages.append(run.controller.compression_stage())
    none, some, full = CompressionStage
    assert stages == [none, none, some, full]
    assert 0 < run.controller.compression_rate < 1
    mask = run.controller.masks()["head"].clone()
    run.train(9)
    assert torch.equal(run.controller.masks()["head"], mask)
    assert float(run.controller.loss()) == 0
    stripped = run.controller.strip()
    assert torch.equal(stripped.head.weight != 0, mask.bool())


def test_bad_epochs_are_named() -> None:
    with pytest.raises(ValueError, match="warmup_end_epoch must come after"):
        create_compressed_model(make_model(), configured(movement(warmup_end_epoch=1)))
    config = {"input_info": {"sample_size": [2, 1, 8, 8]}, "compression": movement()}
    with pytest.raises(ValueError, match="steps_per_epoch"):
        create_compressed_model(make_model(), config)


def test_nothing_waits() -> None:
    check_no_waits(configured(movement(warmup_start_epoch=0)))


def test_compiles() -> None:
    check_compiles(configured(movement(warmup_start_epoch=0)))
