"""Bias correction."""

import copy

import torch
from torch import nn

from tests.coreai_opt.post_training.models import prepared


def test_the_mean_of_the_outputs_is_that_of_the_float_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 6, 8, 8) + torch.linspace(0, 4, 6)[:, None, None]
    for layer in (nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(6, 12, 3, groups=3)):
        model = nn.Sequential(layer)
        exact = copy.deepcopy(model)(x).mean((0, 2, 3))
        quantized, quantizer = prepared(model, x, dtype="int3", block=None)
        before = (quantized(x).mean((0, 2, 3)) - exact).abs().max()
        quantizer.calibrate(list(x.split(16)), "bias_correction")
        after = (quantized(x).mean((0, 2, 3)) - exact).abs().max()
        assert before > 0.05
        assert after < 1e-4


def test_means_are_those_of_the_float_model_behind_quantized_layers() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16) + 1
    model = nn.Sequential(
        nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    exact = model(x)
    rounded, _ = prepared(copy.deepcopy(model), x, dtype="int3", block=None)
    quantized, quantizer = prepared(model, x, dtype="int3", block=None)
    quantizer.calibrate(list(x.split(64)), "bias_correction")
    assert (quantized(x).mean(0) - exact.mean(0)).abs().max() < 1e-4
    assert (quantized(x) - exact).square().sum() < (rounded(x) - exact).square().sum()


def test_a_layer_without_bias_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    _, quantizer = prepared(model, torch.randn(2, 4), block=None)
    assert quantizer.calibrate(torch.randn(9, 4), "bias_correction") == {"0.weight": "the layer has no bias"}
