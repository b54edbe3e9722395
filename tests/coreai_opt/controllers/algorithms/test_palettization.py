from typing import Any

import pytest
import torch

from coreai_opt.controllers import CompressionStage, create_compressed_model

from ..support import Run, check_compiles, check_no_waits, configured, make_model


def palettes(**more: Any) -> dict[str, Any]:
    return {"algorithm": "palettization", "bits": 2, **more}


def test_weights_have_few_values() -> None:
    controller, model = create_compressed_model(make_model(), configured(palettes()))
    assert model.inner.weight.unique().numel() <= 4
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    numel = sum(model.get_submodule(name).weight.numel() for name in ("stem", "inner", "head"))
    assert controller.compression_rate == pytest.approx(1 - (2 * numel + 3 * 4 * 32) / (32 * numel))
    assert controller.statistics().palettization.layers[1].bits == 2


def test_groups_have_their_own() -> None:
    config = palettes(group_size=4, target_scopes=["inner"])
    _, model = create_compressed_model(make_model(), configured(config))
    assert all(part.unique().numel() <= 4 for part in model.inner.weight.split(4))
    assert model.inner.weight.unique().numel() == 8
    with pytest.raises(ValueError, match="group_size 3 does not divide the 8 output channels of 'stem'"):
        create_compressed_model(make_model(), configured(palettes(group_size=3)))


def test_the_weight_trains_and_the_palette_follows() -> None:
    run = Run(configured(palettes()))
    before = run.controller._simulators["head"].centroids.detach().clone()
    run.train(5)
    assert not torch.equal(run.controller._simulators["head"].centroids, before)
    assert run.model.head.weight.unique().numel() <= 4


def test_strip_keeps_the_outputs() -> None:
    run = Run(configured(palettes()))
    run.train(4)
    model = run.model.eval()
    x = torch.randn(2, 1, 8, 8)
    stripped = run.controller.strip()
    assert torch.equal(stripped(x), model(x))
    assert set(stripped.state_dict()) == set(make_model().state_dict())


def test_a_later_start() -> None:
    run = Run(configured(palettes(params={"palettization_start_epoch": 1})))
    run.train(3)
    assert run.controller.compression_stage() is CompressionStage.UNCOMPRESSED
    assert run.model.head.weight.unique().numel() > 100
    run.train(4)
    assert run.controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    assert run.model.head.weight.unique().numel() <= 4


def test_nothing_waits() -> None:
    check_no_waits(configured(palettes()))


def test_compiles() -> None:
    check_compiles(configured(palettes()))
