"""Algorithms that move factors between weights: the float model stays, the quantized one gets better."""

import pytest
import torch
from torch import Tensor, nn

from coreai_opt._call_inputs import Arguments
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.post_training import AWQ, CrossLayerEqualization, SmoothQuant
from coreai_opt.quantization.post_training._accumulators import Gram
from coreai_opt.quantization.post_training._layers import find_layers
from coreai_opt.quantization.post_training._pairs import find_pairs
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, simulators_off
from coreai_opt.quantization.post_training.awq import _loss
from coreai_opt.quantization.post_training.cross_layer_equalization import equalizing_factors
from coreai_opt.quantization.post_training.smoothquant import smoothing_factors
from tests.coreai_opt.post_training.models import batches, loss_of, prepared, tokens, trained


class Convolutions(nn.Module):
    """Layers with very different ranges in their channels, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.d(self.pool(torch.relu(self.c(x))))


def convolutions() -> Convolutions:
    torch.manual_seed(0)
    model = Convolutions().eval()
    with torch.no_grad():
        model.a.weight.mul_(torch.logspace(-2, 1, 8)[:, None, None, None])
        model.b.weight.mul_(torch.logspace(1, -1, 8)[:, None, None, None])
    return model


def with_outliers() -> nn.Module:
    """The trained transformer with some channels of its norms much larger, made up for in what reads them."""
    model = trained()
    factors = torch.ones(64)
    factors[::13] = 30.0
    with torch.no_grad():
        for block in model.blocks:
            for norm, readers in (
                (block.norm1, (block.q, block.k, block.v)),
                (block.norm2, (block.gate, block.up)),
            ):
                norm.weight.mul_(factors)
                if norm is block.norm1:
                    norm.bias.mul_(factors)
                for each in readers:
                    each.weight.div_(factors)
    return model


@pytest.mark.parametrize(
    "algorithm", [AWQ(), SmoothQuant(), CrossLayerEqualization()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("make", [with_outliers, convolutions])
def test_the_float_model_computes_the_same(algorithm: PostTrainingAlgorithm, make: object) -> None:
    data = batches(2) if make is with_outliers else [torch.randn(4, 3, 12, 12) for _ in range(2)]
    exact = make()(data[0])  # type: ignore[operator]
    model, quantizer = prepared(make(), data[0], block=None)  # type: ignore[operator]
    before = {name: each.clone() for name, each in model.named_parameters()}
    quantizer.calibrate(data, algorithm)
    changed = [name for name, each in model.named_parameters() if not torch.equal(each, before[name])]
    if not (make is with_outliers and isinstance(algorithm, CrossLayerEqualization)):
        assert changed
    with simulators_off(model):
        torch.testing.assert_close(model(data[0]), exact, rtol=1e-4, atol=1e-4)


def test_awq_loses_less_than_rounding_with_outliers() -> None:
    test = tokens(256, seed=77)
    with torch.no_grad():
        exact = loss_of(with_outliers(), test)
        rounded, _ = prepared(with_outliers(), batches(1)[0], block=None)
        chosen, quantizer = prepared(with_outliers(), batches(1)[0], block=None)
        quantizer.calibrate(batches(), "awq")
        assert loss_of(chosen, test) - exact < 0.7 * (loss_of(rounded, test) - exact)


def test_smoothquant_loses_less_with_outliers() -> None:
    test = tokens(256, seed=77)

    def quantized() -> tuple[nn.Module, Quantizer]:
        config = QuantizerConfig(
            execution_mode="eager",
            global_config=ModuleQuantizerConfig(
                op_output_spec=None, op_type_config={"add": None, "mul": None}
            ),
            module_type_configs={nn.Embedding: None},
        )
        quantizer = Quantizer(with_outliers(), config)
        return quantizer.prepare((batches(1)[0],)), quantizer

    with torch.no_grad():
        exact = loss_of(with_outliers(), test)
        plain, quantizer = quantized()
        quantizer.calibrate(batches())
        smooth, quantizer = quantized()
        quantizer.calibrate(batches(), SmoothQuant())
        assert loss_of(smooth, test) - exact < 0.5 * (loss_of(plain, test) - exact)


def test_equalization_helps_ranges_of_whole_tensors() -> None:
    x = torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        exact = convolutions()(x)

        def error(algorithm: str | None) -> Tensor:
            model, quantizer = prepared(convolutions(), x, dtype="int8", block=None)
            for name in "abcd":  # one range for each weight, where it matters most
                module = getattr(model, name)
                assert module.parametrizations
            if algorithm:
                quantizer.calibrate(x, algorithm)
            return (model(x) - exact).square().sum()

        assert error("cross_layer_equalization") < error(None)


def test_equalized_channels_have_equal_ranges() -> None:
    x = torch.randn(2, 3, 12, 12)
    model, quantizer = prepared(convolutions(), x, dtype="int8", block=None)
    quantizer.calibrate(x, CrossLayerEqualization(iterations=50, tolerance=1e-4))
    for first, second in (("a", "b"), ("b", "c"), ("c", "d")):
        a, b = (getattr(model, name).parametrizations.weight.original.detach() for name in (first, second))
        inputs = b.flatten(1).abs().amax(1) if second == "b" else b.abs().amax((0, 2, 3))
        torch.testing.assert_close(a.flatten(1).abs().amax(1), inputs, rtol=2e-3, atol=0)


def pairs_of(model: nn.Module, x: Tensor) -> set[tuple[str, ...]]:
    model, _ = prepared(model, x, block=None)
    layers, _ = find_layers(model)
    names = {id(each): name for name, each in model.named_parameters()}
    with simulators_off(model):
        found = find_pairs(model, layers, Arguments((x,), {}))
    return {
        (names[id(pair.parameters[0])].replace(".parametrizations.weight.original", ".weight"),)
        + tuple(layer.name for layer in pair.layers)
        for pair in found
    }


def test_pairs_of_a_transformer() -> None:
    expected = {("norm.weight", "head.weight")}
    for block in ("blocks.0.", "blocks.1."):
        expected.add((f"{block}norm1.weight", f"{block}q.weight", f"{block}k.weight", f"{block}v.weight"))
        expected.add((f"{block}norm2.weight", f"{block}gate.weight", f"{block}up.weight"))
        expected.add((f"{block}up.weight", f"{block}down.weight"))
    assert pairs_of(trained(), batches(1)[0]) == expected


class Odd(nn.Module):
    """Givers whose results are added, squared, given to a gelu, and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x)
        x = self.last(a) + a
        b = self.b(x)
        x = self.c(b * b)
        d = self.d(torch.nn.functional.gelu(x))
        return self.e(d), d


def test_nothing_moves_where_another_operation_reads() -> None:
    assert pairs_of(Odd(), torch.randn(3, 8)) == set()


def test_smoothing_factors_are_equation_4() -> None:
    x, w = torch.rand(50) + 0.1, torch.rand(50) + 0.1
    for alpha in (0.0, 0.3, 1.0):
        expected = x.double() ** alpha / w.double() ** (1 - alpha)
        torch.testing.assert_close(smoothing_factors(x, w, alpha).double(), expected, rtol=1e-6, atol=0)
    assert smoothing_factors(torch.zeros(2), torch.tensor([0.0, 1.0]), 0.5).tolist() == [1.0, 1.0]


def test_equalizing_factors_are_equation_11() -> None:
    a, b = torch.rand(50) + 0.1, torch.rand(50) + 0.1
    expected = (a.double() * b.double()).sqrt() / b.double()
    torch.testing.assert_close(equalizing_factors(a, b).double(), expected, rtol=1e-6, atol=0)


def test_awqs_loss_is_equation_4() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 16) * torch.linspace(0.2, 3, 16)
    model, _ = prepared(nn.Sequential(nn.Linear(16, 6)), x, block=None)
    (layer,), _ = find_layers(model)
    factors = torch.rand(16) + 0.5
    gram = Gram()
    gram.add(x[None])
    weight = layer.weight.detach().double()
    scaled = weight * factors.double()
    scale = scaled.abs().amax(1, keepdim=True) / 7.5
    rounded = (scaled / scale).round().clamp(-8, 7) * scale
    difference = (rounded / factors.double()) @ x.double().T - weight @ x.double().T
    expected = float(difference.square().sum() / len(x))
    assert _loss(layer, factors, gram.matrices()[0]) == pytest.approx(expected, rel=1e-3)
