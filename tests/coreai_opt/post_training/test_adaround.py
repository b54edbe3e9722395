"""AdaRound."""

import torch
from torch import nn

from coreai_opt.quantization.post_training import AdaRound
from coreai_opt.quantization.post_training.adaround import rectified_sigmoid, regularizer
from tests.coreai_opt.post_training.models import batches, loss_of, prepared, tokens, trained


def test_a_trained_transformer_loses_less_than_by_rounding() -> None:
    test = tokens(256, seed=77)
    with torch.no_grad():
        exact = loss_of(trained(), test)
        rounded, _ = prepared(trained(), batches(1)[0])
        chosen, quantizer = prepared(trained(), batches(1)[0])
        quantizer.calibrate(batches(4), AdaRound(iterations=200))
        assert loss_of(chosen, test) - exact < 0.75 * (loss_of(rounded, test) - exact)


def test_each_weight_is_rounded_up_or_down() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 32) @ torch.randn(32, 32)
    for spec in (
        {},
        {"qscheme": "asymmetric", "dtype": "uint4"},
        {"qscheme": "asymmetric", "qformulation": "minval"},
    ):
        model, quantizer = prepared(nn.Sequential(nn.Linear(32, 8)), x, **spec)
        before = model[0].parametrizations.weight.original.detach().clone()
        exact = x @ before.T
        by_rounding = (x @ model[0].weight.T - exact).square().sum()
        quantizer.calibrate(x, AdaRound(iterations=300))
        scale = model[0].parametrizations.weight[0].qparams_calculator.scale
        inside = (before - before.mean()).abs() < 2 * before.std()
        moved = ((model[0].weight - before) / scale.reshape(8, 1)).abs()
        assert moved[inside].max() < 1.001
        assert (moved > 0.501).any()
        assert (x @ model[0].weight.T - exact).square().sum() < 0.8 * by_rounding


def test_formulas() -> None:
    v = torch.linspace(-9, 9, 101, dtype=torch.float64)
    expected = (1.2 / (1 + (-v).exp()) - 0.1).clamp(0, 1)
    torch.testing.assert_close(rectified_sigmoid(v), expected)
    torch.testing.assert_close(regularizer(expected, 3.0), (1 - (2 * expected - 1).abs() ** 3).sum())


def test_float_formats_are_named() -> None:
    _, quantizer = prepared(nn.Sequential(nn.Linear(32, 4)), torch.randn(2, 32), dtype="float4_e2m1fn")
    found = quantizer.calibrate(torch.randn(9, 32), "adaround")
    assert found == {"0.weight": "only integers are rounded up or down"}
