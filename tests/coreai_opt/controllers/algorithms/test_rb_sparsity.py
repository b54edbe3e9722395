from typing import Any

import pytest
import torch

from coreai_opt.controllers import create_compressed_model

from ..support import Run, batch, check_compiles, check_no_waits, configured, make_model


def rb(**params: Any) -> dict[str, Any]:
    settings = {"sparsity_target": 0.6, "sparsity_target_epoch": 2, **params}
    return {"algorithm": "rb_sparsity", "params": settings}


def created(**params: Any) -> tuple[Any, Any]:
    return create_compressed_model(make_model(), configured(rb(**params)))


def test_masks_start_almost_open_and_vary() -> None:
    controller, model = created()
    assert all(bool(mask.all()) for mask in controller.masks().values())
    model.train()
    first, second = model.head.weight == 0, model.head.weight == 0
    assert 0.003 < float(first.float().mean()) < 0.02
    assert not torch.equal(first, second)
    model.eval()
    assert not bool((model.head.weight == 0).any())


@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_loss_is_the_squared_distance_to_the_level(mode: str) -> None:
    controller, _ = created(sparsity_level_setting_mode=mode)
    with torch.no_grad():
        for mask in controller._masks.values():
            mask.logits.view(-1)[::3] = -1
    controller.compression_rate = 0.5
    masks = list(controller.masks().values())
    if mode == "local":
        expected = sum(((float(mask.float().mean()) - 0.5) / 0.05) ** 2 for mask in masks) / len(masks)
    else:
        share = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        expected = ((share - 0.5) / 0.05) ** 2
    loss = controller.loss()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)

    loss.backward()
    mask = controller._masks["head"]
    exact = mask.logits.detach().double().requires_grad_()
    p = exact.sigmoid()
    straight = (exact > 0) + p - p.detach()
    if mode == "local":
        (((straight.mean() - 0.5) / 0.05) ** 2 / len(masks)).backward()
    else:
        total = sum(each.numel() for each in masks)
        others = sum(int(each.sum()) for name, each in controller.masks().items() if name != "head")
        ((((straight.sum() + others) / total - 0.5) / 0.05) ** 2).backward()
    torch.testing.assert_close(mask.logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-12)


def test_training_reaches_the_level() -> None:
    controller, model = created(sparsity_target_epoch=1)
    controller.scheduler.epoch_step(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    model.train()
    for step in range(60):
        x, y = batch(step)
        loss = torch.nn.functional.cross_entropy(model(x), y) + controller.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert controller.achieved_level() == pytest.approx(0.6, abs=0.1)
    found = controller.statistics().rb_sparsity.sparsity_of_masked_weights
    assert found == pytest.approx(controller.achieved_level())


def test_frozen_masks_are_those_of_evaluation() -> None:
    controller, model = created(sparsity_freeze_epoch=1)
    with torch.no_grad():
        controller._masks["head"].logits[0] = -2
    controller.scheduler.epoch_step(1)
    model.train()
    weight = model.head.weight
    assert torch.equal(weight == 0, torch.arange(10)[:, None].eq(0).expand_as(weight))
    loss = controller.loss()
    assert isinstance(loss, torch.Tensor)
    assert float(loss) == 0


def test_layers_and_seeds_draw_different_masks() -> None:
    controller, model = created()
    seeds = [mask.seed for mask in controller._masks.values()]
    assert len(set(seeds)) == 3
    other, _ = create_compressed_model(make_model(), configured({**rb(), "seed": 1}))
    assert not set(seeds) & {mask.seed for mask in other._masks.values()}
    again, twin = created()
    model.train(), twin.train()
    assert torch.equal(model.head.weight, twin.head.weight)
    assert again.name == controller.name


def test_strip_keeps_the_evaluated_outputs() -> None:
    controller, model = created()
    with torch.no_grad():
        for mask in controller._masks.values():
            mask.logits.normal_()
    x = torch.randn(2, 1, 8, 8)
    model.train()
    stripped = controller.strip().eval()
    assert torch.equal(stripped(x), model.eval()(x))
    assert set(stripped.state_dict()) == set(make_model().state_dict())


def test_the_learning_rate_multiplier_scales_the_logits_gradient() -> None:
    grads = []
    for factor in (1.0, 0.25):
        config = configured({**rb(), "compression_lr_multiplier": factor})
        controller, _ = create_compressed_model(make_model(), config)
        controller.compression_rate = 0.5
        controller.loss().backward()
        grads.append(controller._masks["head"].logits.grad)
    torch.testing.assert_close(grads[1], grads[0] * 0.25)


def test_nothing_waits() -> None:
    check_no_waits(configured(rb()))


def test_compiles() -> None:
    check_compiles(configured(rb()))


def test_a_rerun_is_the_same_run() -> None:
    runs = [Run(configured(rb())) for _ in range(2)]
    for run in runs:
        torch.manual_seed(torch.seed())
        run.train(4)
    assert torch.equal(torch.stack(runs[0].losses), torch.stack(runs[1].losses))
