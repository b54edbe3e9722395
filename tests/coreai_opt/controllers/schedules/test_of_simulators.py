"""Controllers driven by the schedules of pruners, palettizers and quantizers, which count optimizer steps."""

from typing import Any

import pytest
import torch

from coreai_opt.controllers import create_compressed_model
from coreai_opt.palettization.config import PATSchedule
from coreai_opt.pruning.config import CosineSparsitySchedule, PolynomialDecaySchedule
from coreai_opt.quantization.config import QATSchedule

from ..support import batch, configured, make_model

COSINE = {"type": "cosine", "begin_step": 2, "total_iters": 6}


def sparsity(schedule: Any, **params: Any) -> dict[str, Any]:
    return {
        "algorithm": "magnitude_sparsity",
        "params": {"schedule": schedule, "sparsity_target": 0.8, "steps_per_epoch": 3, **params},
    }


@pytest.mark.parametrize("schedule", [COSINE, CosineSparsitySchedule(begin_step=2, total_iters=6)])
def test_sparsity_is_that_of_the_pruners_schedule(schedule: Any) -> None:
    controller, _ = create_compressed_model(make_model(), configured(sparsity(schedule)))
    planned = {(e.epoch, e.step): e.level for e in controller.plan(4, 3).changes if e.what == "level"}
    its = CosineSparsitySchedule(begin_step=2, total_iters=6)
    for epoch in range(4):
        controller.scheduler.epoch_step()
        for step in range(3):
            controller.scheduler.step()
            wanted = its.compute_sparsity(3 * epoch + step, 0.8)
            assert controller.level == wanted
            assert planned.get((epoch, step), wanted) == wanted
    assert planned[2, 2] == controller.level == 0.8
    masks = list(controller.masks().values())
    kept = sum(int((mask != 0).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert 1 - kept == pytest.approx(0.8, abs=1e-3)


def test_it_resumes_in_mid_epoch() -> None:
    config = configured(sparsity(COSINE))
    controller, model = create_compressed_model(make_model(), config)
    controller.scheduler.epoch_step()
    for _ in range(5):
        controller.scheduler.step()
    resumed, copy = create_compressed_model(make_model(), config, controller.get_compression_state())
    copy.load_state_dict(model.state_dict())
    for each in (controller, resumed):
        each.scheduler.step()
    assert resumed.level == controller.level > 0
    for mine, other in zip(resumed.masks().values(), controller.masks().values(), strict=True):
        assert torch.equal(mine, other)


def test_masks_freeze_only_where_the_configuration_says() -> None:
    schedule = PolynomialDecaySchedule(total_iters=400)
    free, _ = create_compressed_model(make_model(), configured(sparsity(schedule)))
    ended, _ = create_compressed_model(make_model(), configured(sparsity(schedule, sparsity_freeze_epoch=2)))
    for _ in range(120):
        for each in (free, ended):
            each.scheduler.epoch_step()
            for _ in range(3):
                each.scheduler.step()
    assert free.level == schedule.compute_sparsity(359, 0.8)
    assert ended.level == schedule.compute_sparsity(5, 0.8)


def test_filters() -> None:
    algorithm = {
        "algorithm": "filter_pruning",
        "params": {"schedule": COSINE, "pruning_target": 0.5, "prune_first_conv": True},
    }
    controller, _ = create_compressed_model(make_model(width=32), configured(algorithm))
    for step in range(9):
        controller.scheduler.step()
        wanted = CosineSparsitySchedule(begin_step=2, total_iters=6).compute_sparsity(step, 0.5)
        assert controller.level == wanted
    algorithm["params"]["all_weights"] = True
    with pytest.raises(ValueError, match="moves at optimizer steps excludes all_weights"):
        create_compressed_model(make_model(width=32), configured(algorithm))


@pytest.mark.parametrize("schedule", [PATSchedule(enable_fake_palettize=4), {"enable_fake_palettize": 4}])
def test_palettes(schedule: Any) -> None:
    algorithm = {"algorithm": "palettization", "bits": 2, "params": {"schedule": schedule}}
    controller, model = create_compressed_model(make_model(), configured(algorithm))
    assert [(e.epoch, e.step) for e in controller.plan(3, 3).changes] == [(1, 1)]
    values = []
    for _ in range(2):
        controller.scheduler.epoch_step()
        for _ in range(3):
            controller.scheduler.step()
            values.append(len(model.inner.weight.unique()))
    assert min(values[:4]) > 4
    assert max(values[4:]) <= 4
    algorithm["params"]["palettization_start_epoch"] = 1
    with pytest.raises(ValueError, match="exclude each other"):
        create_compressed_model(make_model(), configured(algorithm))


def test_quantization() -> None:
    schedule = QATSchedule(enable_observer=1, enable_fake_quant=3, disable_observer=5)
    algorithm = {
        "algorithm": "quantization",
        "initializer": {"range": {"num_init_samples": 0}},
        "params": {"schedule": schedule},
    }
    controller, model = create_compressed_model(make_model(), configured(algorithm))
    assert [(e.epoch, e.step, e.what) for e in controller.plan(3, 3).changes] == [
        (0, 1, "ranges follow"),
        (1, 0, "weights and activations quantized"),
        (1, 2, "ranges stay"),
    ]
    float_output = make_model()(batch(0)[0])
    calculator = controller.activations["stem"].qparams_calculator
    before = calculator.scale.clone()
    scales = []
    for step in range(7):
        controller.scheduler.step()
        assert controller.compression_stage().name == ("FULLY_COMPRESSED" if step >= 3 else "UNCOMPRESSED")
        output = model(batch(0)[0] * (step + 1))
        if step < 3:
            assert torch.equal(output, make_model()(batch(0)[0] * (step + 1)))
        scales.append(calculator.scale.clone())
    assert not torch.equal(model(batch(0)[0]), float_output)
    moved = [not torch.equal(new, old) for new, old in zip(scales, [before, *scales], strict=False)]
    assert moved == [False, True, True, True, True, False, False]
    algorithm["params"]["weights_quant_start_epoch"] = 1
    with pytest.raises(ValueError, match="schedule excludes"):
        create_compressed_model(make_model(), configured(algorithm))
