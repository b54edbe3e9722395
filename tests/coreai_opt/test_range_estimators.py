"""Range estimators beside min-max."""

import numpy as np
import pytest
import torch
from torch import Tensor

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import (
    MSERangeCalculator,
    PerBlockGranularity,
    PercentileRangeCalculator,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from coreai_opt.quantization.spec.range_estimators import entropy_threshold

WEIGHT, ACTIVATION = CompressionTargetTensor.WEIGHT, CompressionTargetTensor.ACTIVATION


def heavy(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).pow(3)


@pytest.mark.parametrize("percentile", [99.0, 99.9, 75.0, 100.0])
def test_percentiles_are_numpys_of_nearest_rank(percentile: float) -> None:
    x = heavy(6, 40)
    for granularity, axis, blocks in (
        (PerTensorGranularity(), None, (1, 1)),
        (PerChannelGranularity(axis=0), 1, (6, 1)),
    ):
        low, high = PercentileRangeCalculator(granularity, WEIGHT, percentile=percentile)(x)
        expected = np.percentile(x.double().numpy(), percentile, axis=axis, method="inverted_cdf")
        mirrored = -np.percentile(-x.double().numpy(), percentile, axis=axis, method="inverted_cdf")
        assert high.shape == low.shape == blocks
        np.testing.assert_array_equal(high.double().numpy().reshape(-1), np.reshape(expected, -1))
        np.testing.assert_array_equal(low.double().numpy().reshape(-1), np.reshape(mirrored, -1))


def test_percentiles_of_blocks_are_in_their_order() -> None:
    x = heavy(4, 12)
    low, high = PercentileRangeCalculator(PerBlockGranularity(axis=1, block_size=4), WEIGHT, percentile=100)(
        x
    )
    assert torch.equal(high, x.reshape(4, 3, 4).amax(2))
    assert torch.equal(low, x.reshape(4, 3, 4).amin(2))


def simulated(x: Tensor, estimator: str, **settings: object) -> Tensor:
    spec = QuantizationSpec(range_calculator_cls=estimator, **settings)
    return QuantizationComponentFactory.create_fake_quantizer(spec, WEIGHT)(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "int4"},
        {"dtype": "uint4", "qscheme": "asymmetric"},
        {"dtype": "int4", "granularity": PerBlockGranularity(axis=1, block_size=32)},
        {"dtype": "float8_e4m3fn", "granularity": PerChannelGranularity(axis=0)},
        {"dtype": "int4", "granularity": PerChannelGranularity(axis=0), "qscheme": "asymmetric"},
    ],
)
def test_mse_has_a_smaller_error_than_minmax(settings: dict[str, object]) -> None:
    x = heavy(16, 64)
    by_mse = (simulated(x, "mse", **settings) - x).square().sum()
    assert by_mse < (simulated(x, "minmax", **settings) - x).square().sum()


def test_mse_is_the_best_of_the_steps_in_float64() -> None:
    x = heavy(200).reshape(1, 200)
    spec = QuantizationSpec(dtype="int4", range_calculator_cls="mse")
    low, high = QuantizationComponentFactory.create_range_calculator(spec, WEIGHT)(x)
    values = x.double().numpy()
    errors = []
    shares = 1 - 0.8 * np.arange(80) / 79
    for share in shares:
        scale = np.abs(values).max() * share / 7.5
        errors.append(np.square(np.clip(np.round(values / scale), -8, 7) * scale - values).sum())
    chosen = float((high / x.max()).item())
    assert errors[int(np.argmin(np.abs(shares - chosen)))] == pytest.approx(min(errors), rel=1e-5)
    assert float((low / x.min()).item()) == pytest.approx(chosen)


def divergence_by_hand(counts: np.ndarray, kept: int, levels: int) -> float:
    p = np.append(counts[: kept - 1], counts[kept - 1 :].sum())
    q = np.zeros(kept)
    for level in range(levels):
        run = slice(level * kept // levels, (level + 1) * kept // levels)
        filled = counts[run] > 0
        if filled.any():
            q[run] = np.where(filled, counts[run].sum() / filled.sum(), 0)
    if ((q == 0) & (p > 0)).any():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def test_entropy_takes_the_least_divergence() -> None:
    counts = np.histogram(heavy(20000).abs().numpy(), 256)[0].astype(np.float64)
    chosen = entropy_threshold(counts, 16)
    every = {kept: divergence_by_hand(counts, kept, 16) for kept in range(16, 257)}
    assert every[chosen] == pytest.approx(min(every.values()))
    assert chosen < 256


def test_entropy_cuts_outliers_of_activations() -> None:
    x = torch.cat([torch.randn(20000, generator=torch.Generator().manual_seed(1)), torch.tensor([60.0])])
    spec = QuantizationSpec(range_calculator_cls="entropy", qparam_calculator_cls="moving_average")
    simulator = QuantizationComponentFactory.create_fake_quantizer(spec, ACTIVATION)
    simulator(x)
    assert simulator.qparams_calculator.scale.item() < 20 / 127.5


@pytest.mark.parametrize("estimator", ["percentile", "mse", "entropy"])
def test_nan_zero_and_empty_tensors(estimator: str) -> None:
    spec = QuantizationSpec(range_calculator_cls=estimator)
    calculator = QuantizationComponentFactory.create_range_calculator(spec, WEIGHT)
    low, high = calculator(torch.zeros(3, 4))
    assert low.item() == high.item() == 0
    low, high = calculator(torch.tensor([[1.0, float("nan")]]))
    assert low.isnan().all() or high.isnan().all()
    with pytest.raises(IndexError, match="empty"):
        calculator(torch.zeros(0, 4))


def test_a_specification_can_set_an_estimators_fields() -> None:
    class Spec(QuantizationSpec):
        percentile: float = 90.0

    calculator = QuantizationComponentFactory.create_range_calculator(
        Spec(range_calculator_cls="percentile"), WEIGHT
    )
    assert calculator.percentile == 90.0
    with pytest.raises(ValueError, match="percentile must be above 50"):
        PercentileRangeCalculator(PerTensorGranularity(), percentile=20)
    with pytest.raises(RuntimeError, match="depends on how values are quantized"):
        MSERangeCalculator(PerTensorGranularity())(torch.randn(3))
