"""GPTQ: against the paper's algorithm in float64, and what it does for models."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coreai_opt
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, Quantizer, QuantizerConfig
from coreai_opt.quantization.post_training import GPTQ
from coreai_opt.quantization.post_training import gptq as gptq_module
from coreai_opt.quantization.post_training._layers import Columns
from coreai_opt.quantization.spec import PerChannelGranularity
from tests.coreai_opt.post_training.models import batches, loss_of, prepared, tokens, trained


def scheme(model: nn.Module) -> list[Tensor]:
    """The simulated weights."""
    with torch.no_grad():
        return [each.weight.clone() for each in model.modules() if hasattr(each, "parametrizations")]


def paper(weight: Tensor, inputs: Tensor, scale: Tensor, damping: float) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323, column by column: the inverse is updated instead of factorized."""
    weight, inputs = weight.double().clone(), inputs.double()
    hessian = inputs.T @ inputs / len(inputs)
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = hessian.inverse()
    result = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        result[:, column] = (weight[:, column] / scale).round().clamp(-8, 7) * scale
        error = (weight[:, column] - result[:, column]) / inverse[column, column]
        weight[:, column:] -= error[:, None] * inverse[column, column:]
        inverse = inverse - inverse[:, column, None] * inverse[None, column] / inverse[column, column]
    return result


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def correlated(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.linspace(0.1, 2, size)
    return torch.randn(count, size, generator=generator) @ mix / size**0.5


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_codes_are_those_of_the_paper(block_size: int) -> None:
    torch.manual_seed(1)
    model, x = Linear(48, 20), correlated(400, 48)
    weight = model.layer.weight.detach().clone()
    model, quantizer = prepared(model, x, block=None)
    scale = model.layer.parametrizations.weight[0].qparams_calculator.scale.reshape(-1).double()
    quantizer.calibrate(x, GPTQ(act_order=False, block_size=block_size))
    expected = paper(weight, x, scale, 0.01)
    codes, wanted = (
        (model.layer.weight.double() / scale[:, None]).round(),
        (expected / scale[:, None]).round(),
    )
    # A value between two codes may fall to either side in float32.
    assert (codes != wanted).double().mean() < 0.002
    assert (codes - wanted).abs().max() <= 1


def test_act_order_is_the_paper_with_columns_sorted() -> None:
    torch.manual_seed(1)
    model, x = Linear(48, 20), correlated(400, 48)
    weight = model.layer.weight.detach().clone()
    order = x.square().sum(0).argsort(descending=True)
    model, quantizer = prepared(model, x, block=None)
    scale = model.layer.parametrizations.weight[0].qparams_calculator.scale.reshape(-1).double()
    quantizer.calibrate(x, GPTQ())
    expected = paper(weight[:, order], x[:, order], scale, 0.01)
    codes = (model.layer.weight[:, order].double() / scale[:, None]).round()
    assert (codes != (expected / scale[:, None]).round()).double().mean() < 0.002


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(2000, 700).double()
    matrix = x.T @ x / len(x) + 0.01 * torch.eye(700, dtype=torch.float64)
    factor = gptq_module.inverse_factor(matrix)
    assert factor is not None
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor @ matrix, torch.eye(700, dtype=torch.float64), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"sequential": "layer"}])
def test_a_trained_transformer_loses_less_than_by_rounding(options: dict[str, object]) -> None:
    test = tokens(256, seed=77)
    with torch.no_grad():
        exact = loss_of(trained(), test)
        rounded, _ = prepared(trained(), batches(1)[0])
        chosen, quantizer = prepared(trained(), batches(1)[0])
        assert quantizer.calibrate(batches(), GPTQ(**options)) == {}
        by_rounding, by_gptq = loss_of(rounded, test) - exact, loss_of(chosen, test) - exact
    assert by_gptq < 0.75 * by_rounding


def test_each_block_dtype_and_formulation_has_a_smaller_error() -> None:
    x = correlated(300, 64)
    for spec in (
        {"dtype": "int3", "block": 16},
        {"dtype": "uint4", "block": 32, "qscheme": "asymmetric"},
        {"dtype": "int4", "block": 64, "qscheme": "asymmetric", "qformulation": "minval"},
        {"dtype": "float4_e2m1fn", "block": 32},
    ):
        for act_order in (True, False):
            torch.manual_seed(0)
            model = Linear(64, 24)
            exact = model(x)
            rounded, _ = prepared(copy.deepcopy(model), x, **spec)  # type: ignore[arg-type]
            chosen, quantizer = prepared(model, x, **spec)  # type: ignore[arg-type]
            quantizer.calibrate(x, GPTQ(act_order=act_order))
            ratio = (chosen(x) - exact).square().sum() / (rounded(x) - exact).square().sum()
            assert ratio < 0.8, (spec, act_order, ratio)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_have_a_smaller_error(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Linear(64, 24).to(dtype), correlated(300, 64).to(dtype)
    exact = model(x).float()
    rounded, _ = prepared(copy.deepcopy(model), x)
    chosen, quantizer = prepared(model, x)
    quantizer.calibrate(x, "gptq")
    assert model.layer.parametrizations.weight.original.dtype == dtype
    error = (chosen(x).float() - exact).square().sum()
    assert error < 0.6 * (rounded(x).float() - exact).square().sum()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Conv2d(8, 12, (3, 1), stride=(2, 1), dilation=(1, 2), padding="valid", groups=2),
        nn.Conv1d(8, 12, 5, padding="same"),
        nn.Conv3d(4, 6, 2, stride=2, padding=(0, 1, 0)),
        nn.Conv2d(8, 8, 3, groups=8, padding=1, padding_mode="reflect"),
    ],
)
def test_convolutions_have_a_smaller_error(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer.reset_parameters()
    axes = layer.weight.dim() - 2
    # Neighbours are alike.
    x = torch.randn(16, layer.in_channels, *[6] * axes).cumsum(2).cumsum(-1)
    model = nn.Sequential(copy.deepcopy(layer))
    exact = model(x)
    rounded, _ = prepared(copy.deepcopy(model), x, block=None)
    chosen, quantizer = prepared(model, x, block=None)
    quantizer.calibrate(x, "gptq")
    assert (chosen(x) - exact).square().sum() < 0.9 * (rounded(x) - exact).square().sum()


def test_what_is_finalized_and_saved_is_what_was_chosen() -> None:
    data = tokens(64, seed=3)[:, :-1]
    model, quantizer = prepared(trained(), batches(1)[0])
    quantizer.calibrate(batches(2), "gptq")
    with torch.no_grad():
        expected = model(data)
    other, _ = prepared(trained(), batches(1)[0])
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(data), expected)
        finalized = quantizer.finalize(backend="torch")
        assert torch.equal(finalized(data), expected)


def test_training_and_calibration_keep_the_scales() -> None:
    model, quantizer = prepared(trained(), batches(1)[0])
    quantizer.calibrate(batches(2), "gptq")
    layer = model.blocks[0].q
    scale = layer.parametrizations.weight[0].qparams_calculator.scale.clone()
    chosen = scheme(model)
    with quantizer.calibration_mode(), torch.no_grad():
        model(batches(1)[0])
    assert all(map(torch.equal, scheme(model), chosen))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with quantizer.training_mode():
        before = loss_of(model, tokens(64, seed=5))
        for _ in range(5):
            loss = loss_of(model, tokens(64, seed=5))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss_of(model, tokens(64, seed=5)) < before
    assert torch.equal(layer.parametrizations.weight[0].qparams_calculator.scale, scale)


def test_a_run_that_was_ended_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, quantizer = prepared(trained(), batches(1)[0])
    quantizer.calibrate(batches(2), "gptq")
    write, written = Columns.write, []

    def failing(self: Columns, *args: object) -> None:
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append(self.layer.name)
        write(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Columns, "write", failing)
        _, quantizer = prepared(trained(), batches(1)[0])
        with pytest.raises(KeyboardInterrupt):
            quantizer.calibrate(batches(2), "gptq", state_path=tmp_path / "state")
    resumed, quantizer = prepared(trained(), batches(1)[0])
    again: list[str] = []
    monkeypatch.setattr(
        Columns, "write", lambda self, *args: (again.append(self.layer.name), write(self, *args))
    )
    quantizer.calibrate(batches(2), "gptq", state_path=tmp_path / "state")
    assert all(map(torch.equal, scheme(resumed), scheme(whole)))
    # What was not finished when it ended is done again: layers that read the same tensor.
    assert 0 < len(again) < 15
    with pytest.raises(ValueError, match="belongs to a run with another"):
        prepared(trained(), batches(1)[0])[1].calibrate(batches(1), "gptq", state_path=tmp_path / "state")


def test_the_chain_of_blocks_gives_what_whole_forwards_give(monkeypatch: pytest.MonkeyPatch) -> None:
    by_block, quantizer = prepared(trained(), batches(1)[0])
    quantizer.calibrate(batches(2), GPTQ(sequential="layer"))
    monkeypatch.setattr("coreai_opt.quantization.post_training._order._containers", lambda *_: [])
    by_model, quantizer = prepared(trained(), batches(1)[0])
    quantizer.calibrate(batches(2), GPTQ(sequential="layer"))
    assert all(map(torch.equal, scheme(by_block), scheme(by_model)))


def test_one_call() -> None:
    model, _ = coreai_opt.quantize(trained(), batches(2), "w4", algorithm="gptq")
    rounded, _ = coreai_opt.quantize(trained(), batches(2), "w4")
    test = tokens(256, seed=77)
    with torch.no_grad():
        assert loss_of(model, test) < loss_of(rounded, test)


def test_activations_are_calibrated_afterwards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    x = [correlated(50, 32, seed) for seed in range(3)]
    exact = model(x[0])
    chosen, quantizer = coreai_opt.quantize(model, x, "w8a8", algorithm="gptq")
    torch.testing.assert_close(chosen(x[0]), exact, rtol=0.1, atol=0.1)
    assert quantizer.summary().activations > 0


class Experts(nn.Module):
    """The second expert is for larger batches."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x) if len(x) < 4 else self.experts[0](x) + self.experts[1](x)


def test_layers_that_no_batch_reaches_are_named(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, quantizer = prepared(Experts(), torch.randn(4, 16), block=None)
    before = model.experts[1].weight.clone()
    found = quantizer.calibrate([torch.randn(3, 16)], "gptq")
    assert list(found) == ["experts.1.weight"]
    assert "GPTQ left experts.1.weight as it was" in caplog.text
    assert torch.equal(model.experts[1].weight, before)


def test_other_operations_stay_as_they_are_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 4))
    ids = torch.arange(8)
    spec = QuantizationSpec(dtype="int4", granularity=PerChannelGranularity(axis=None))
    entry = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})
    quantizer = Quantizer(model, QuantizerConfig(global_config=entry, execution_mode="eager"))
    quantizer.prepare((ids,))
    found = quantizer.calibrate([ids, ids.flip(0)], "gptq")
    assert list(found) == ["0.weight"]
    assert "GPTQ left 0.weight as it was" in caplog.text


def test_clear_errors() -> None:
    x = correlated(50, 16)
    model, quantizer = prepared(nn.Sequential(nn.Linear(16, 4)), x, block=None)
    with pytest.raises(ValueError, match="GPTQ needs calibration data"):
        quantizer.calibrate(None, "gptq")
    with pytest.raises(ValueError, match="no class registered under the key 'gptk'"):
        quantizer.calibrate(x, "gptk")
    with pytest.raises(TypeError, match="algorithm must be a name"):
        quantizer.calibrate(x, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_batches must be"):
        quantizer.calibrate(x, "gptq", num_batches=0)
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"0\.weight: its inputs hold NaN or infinite values"):
        quantizer.calibrate(torch.full((3, 16), float("nan")), "gptq")
    assert torch.equal(model[0].weight, before)
    with pytest.raises(
        ValueError, match=r"0\.weight: the Hessian of its 16 inputs is singular.*more damping"
    ):
        quantizer.calibrate(torch.ones(3, 16) * 1e4, GPTQ(damping=1e-12))
    unprepared = coreai_opt.quantization.Quantizer(nn.Sequential(nn.Linear(16, 4)))
    with pytest.raises(RuntimeError, match="not prepared"):
        unprepared.calibrate(x, "gptq")
    with pytest.raises(ValueError, match="damping"):
        GPTQ(damping=0)


def test_blocks_across_the_inputs_are_refused() -> None:
    from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
    from coreai_opt.quantization.spec import PerBlockGranularity, QuantizationSpec

    spec = QuantizationSpec(dtype="int4", granularity=PerBlockGranularity(block_size=(1, 4, 1, -1)))
    layers = ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})
    x = torch.randn(2, 8, 6, 6)
    quantizer = Quantizer(
        nn.Sequential(nn.Conv2d(8, 4, 3)), QuantizerConfig(execution_mode="eager", global_config=layers)
    )
    quantizer.prepare((x,))
    with pytest.raises(ValueError, match="do not lie side by side along the inputs"):
        quantizer.calibrate(x, "gptq")


def test_columns_of_convolutions_give_their_outputs() -> None:
    from coreai_opt.quantization.post_training._capture import Capture, columns_of
    from coreai_opt.quantization.post_training._layers import find_layers
    from coreai_opt.quantization.post_training.algorithm import simulators_off

    for layer in (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
        nn.Conv1d(3, 5, 4, padding="same", bias=False),
    ):
        x = torch.randn(2, layer.in_channels, *[9] * (layer.weight.dim() - 2))
        model, _ = prepared(nn.Sequential(layer), x, block=None)
        layers, _ = find_layers(model)
        seen: list[Tensor] = []
        with simulators_off(model):
            with Capture(layers, lambda layer, given, seen=seen: seen.append(columns_of(layer, given))):
                output = model(x)
            weight = layers[0].weight.detach().reshape(layers[0].groups, -1, seen[0].shape[2])
            product = (weight @ seen[0].mT).reshape(output.shape[1], -1)
        torch.testing.assert_close(product, output.transpose(0, 1).flatten(1))


def test_functions_that_read_a_weight_twice_are_seen_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(F.relu(self.a(x))))

    torch.manual_seed(0)
    model, x = Twice(), correlated(200, 16)
    exact = model(x)
    rounded, _ = prepared(copy.deepcopy(model), x, block=None)
    chosen, quantizer = prepared(model, x, block=None)
    quantizer.calibrate(x, "gptq")
    assert (chosen(x) - exact).square().sum() < (rounded(x) - exact).square().sum()
