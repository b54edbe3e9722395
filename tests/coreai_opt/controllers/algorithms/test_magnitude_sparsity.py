import pytest
import torch

from coreai_opt.controllers import CompressionStage, create_compressed_model

from ..support import check_compiles, check_no_waits, configured, make_model


def magnitude(**params: object) -> dict[str, object]:
    settings = {"schedule": "polynomial", "sparsity_target": 0.7, "sparsity_target_epoch": 2, **params}
    return {"algorithm": "magnitude_sparsity", "sparsity_init": 0.1, "params": settings}


def masks_of(controller: object) -> list[torch.Tensor]:
    return list(controller.masks().values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", [0.0, 0.25, 0.333, 0.9, 1.0])
@pytest.mark.parametrize("importance", ["abs", "normed_abs"])
def test_a_global_level_masks_exactly_as_many(level: float, importance: str) -> None:
    controller, _ = create_compressed_model(make_model(), configured(magnitude(weight_importance=importance)))
    controller.compression_rate = level
    masks = masks_of(controller)
    total = sum(mask.numel() for mask in masks)
    assert total - sum(int(mask.sum()) for mask in masks) == round(level * total)
    assert controller.compression_rate == level


def test_a_local_level_masks_as_many_in_each_layer() -> None:
    config = configured(magnitude(sparsity_level_setting_mode="local"))
    controller, _ = create_compressed_model(make_model(), config)
    controller.compression_rate = 0.5
    for mask in masks_of(controller):
        assert mask.numel() - int(mask.sum()) == round(0.5 * mask.numel())


def test_level_zero_masks_nothing_and_ties_do_not_over_prune() -> None:
    model = make_model()
    with torch.no_grad():
        for layer in (model.stem, model.inner, model.head):
            layer.weight.fill_(0.25)
    controller, _ = create_compressed_model(model, configured(magnitude()))
    controller.compression_rate = 0.0
    assert all(bool((mask == 1).all()) for mask in masks_of(controller))
    controller.compression_rate = 0.5
    masks = masks_of(controller)
    assert sum(int(mask.sum()) for mask in masks) == sum(mask.numel() for mask in masks) // 2


def test_normed_importance_is_relative_to_the_layer() -> None:
    model = make_model()
    with torch.no_grad():
        model.stem.weight.mul_(1e-3)
    by_norm, _ = create_compressed_model(model, configured(magnitude()))
    by_norm.compression_rate = 0.5
    assert 0.2 < float(by_norm.masks()["stem"].mean()) < 0.95

    model = make_model()
    with torch.no_grad():
        model.stem.weight.mul_(1e-3)
    by_magnitude, _ = create_compressed_model(model, configured(magnitude(weight_importance="abs")))
    by_magnitude.compression_rate = 0.5
    assert float(by_magnitude.masks()["stem"].sum()) == 0


def test_a_layer_of_zeros_has_no_importance() -> None:
    model = make_model()
    with torch.no_grad():
        model.inner.weight.zero_()
    controller, _ = create_compressed_model(model, configured(magnitude()))
    controller.compression_rate = 0.4
    assert float(controller.masks()["inner"].sum()) == 0


def test_stage_follows_the_level() -> None:
    config = configured({**magnitude(), "sparsity_init": 0.0})
    controller, _ = create_compressed_model(make_model(), config)
    assert controller.compression_stage() is CompressionStage.UNCOMPRESSED
    controller.scheduler.epoch_step(1)
    assert controller.compression_stage() is CompressionStage.PARTIALLY_COMPRESSED
    controller.scheduler.epoch_step()
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED


def test_strip_leaves_zeros_and_the_same_outputs() -> None:
    controller, model = create_compressed_model(make_model().eval(), configured(magnitude()))
    controller.compression_rate = 0.6
    x = torch.randn(2, 1, 8, 8)
    stripped = controller.strip()
    assert torch.equal(stripped(x), model(x))
    assert "parametrizations" not in str(stripped.state_dict().keys())
    assert "parametrizations" in str(model.state_dict().keys())
    controller.prepare_for_export()
    assert list(model.state_dict()) == list(stripped.state_dict())


def test_nothing_waits() -> None:
    check_no_waits(configured(magnitude(update_per_optimizer_step=True)))


def test_compiles() -> None:
    check_compiles(configured(magnitude()))
