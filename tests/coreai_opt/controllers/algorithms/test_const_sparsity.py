import torch

from coreai_opt.controllers import CompressionStage, create_compressed_model

from ..support import Run, check_compiles, check_no_waits, configured, make_model

CONST = {"algorithm": "const_sparsity"}


def sparse_model() -> torch.nn.Module:
    model = make_model()
    with torch.no_grad():
        model.head.weight[::2] = 0
    return model


def test_zeros_stay_zeros() -> None:
    controller, model = create_compressed_model(sparse_model(), configured(CONST))
    assert controller.compression_stage() is CompressionStage.FULLY_COMPRESSED
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    weight = controller.strip().head.weight
    assert bool((weight[::2] == 0).all())
    assert bool((weight[1::2] != 0).any())
    assert controller.statistics().const_sparsity.layers[-1].sparsity == 0.5


def test_the_mask_is_restored_rather_than_found_again() -> None:
    run = Run(configured(CONST))
    run.controller._masks["head"].mask[0] = 0
    resumed = Run.resumed(configured(CONST), run.save())
    assert float(resumed.controller.masks()["head"][0].sum()) == 0
    assert resumed.controller.compression_rate == run.controller.compression_rate > 0


def test_nothing_waits() -> None:
    check_no_waits(configured(CONST))


def test_compiles() -> None:
    check_compiles(configured(CONST))
