"""Quantizer.finalize for Core AI: what the model holds afterwards, and what is refused."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt import ExportBackend
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import Quantizer, QuantizerConfig
from coreai_opt.quantization import _export_utils as handlers
from coreai_opt.quantization._export import finalize_eager
from coreai_opt.quantization.spec import (
    DynamicQParamsCalculator,
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from tests.coreai_opt.export.models import example, mlp, output, quantizer

CHANNELS = PerChannelGranularity(axis=0)


@pytest.fixture
def operators():
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")


def test_the_state_is_that_of_apples_package(operators):
    model = mlp()
    finalized = quantizer(model, {"granularity": CHANNELS}, {}).finalize()
    assert finalized is model
    state = {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}
    first = {name: each for name, each in state.items() if name.startswith("0.")}
    assert first == {
        "0.bias": (torch.float32, (32,)),
        "0.linear_quantize_input.quantize.scale": (torch.float32, ()),
        "0.linear_quantize_input.quantize.zero_point": (torch.int8, ()),
        "0.linear_quantize_input.dequantize.scale": (torch.float32, ()),
        "0.linear_quantize_input.dequantize.zero_point": (torch.int8, ()),
        "0.linear_quantize_output_0.quantize.scale": (torch.float32, ()),
        "0.linear_quantize_output_0.quantize.zero_point": (torch.int8, ()),
        "0.linear_quantize_output_0.dequantize.scale": (torch.float32, ()),
        "0.linear_quantize_output_0.dequantize.zero_point": (torch.int8, ()),
        "0.parametrizations.weight.original": (torch.float32, (0,)),
        "0.parametrizations.weight.0.quantized_data": (torch.int8, (32, 64)),
        "0.parametrizations.weight.0.scale": (torch.float32, (32, 1)),
        "0.parametrizations.weight.0.zero_point": (torch.int8, (32, 1)),
    }


def test_four_bit_values_are_two_a_byte_first_one_low(operators):
    model = nn.Sequential(nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:, :4] = torch.tensor([0.5, -6.0, 1.0, 3.0])
    block = PerBlockGranularity(axis=1, block_size=32)
    quantizer(model, {"dtype": "float4_e2m1fn", "granularity": block}).finalize()
    packed = model[0].parametrizations.weight[0].quantized_data
    assert packed.shape == (32, 32)
    assert packed.dtype == torch.uint8
    assert packed[0, :2].tolist() == [0xF1, 0x52]


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay_and_the_model_is_no_longer_prepared(operators, training):
    model = mlp()
    made = quantizer(model, {"granularity": CHANNELS})
    model.train(training)
    made.finalize()
    assert all(module.training is training for module in model.modules())
    with pytest.raises(RuntimeError, match="not prepared"):
        made.finalize()


def test_a_copy_is_finalized_alone(operators):
    model = mlp()
    made = quantizer(model, {"granularity": CHANNELS}, {})
    expected = output(model)
    finalized = made.finalize(copy.deepcopy(model))
    assert torch.equal(output(finalized), expected)
    assert torch.equal(output(model), expected)
    assert torch.equal(output(copy.deepcopy(finalized)), expected)


@pytest.mark.parametrize("scheme", ["symmetric", "symmetric_with_clipping", "asymmetric"])
@pytest.mark.parametrize("formulation", ["zp", "minval"])
def test_clipping_schemes_keep_their_range(operators, scheme, formulation):
    """Apple's export of clipping schemes with a minimum is off by one step of the scale."""
    fields = {"qscheme": scheme, "qformulation": formulation}
    model = mlp()
    made = quantizer(model, {**fields, "granularity": CHANNELS}, fields)
    large = tuple(8 * each for each in example(model))  # beyond the range that was observed
    with torch.no_grad():
        expected = model(*large)
        computed = made.finalize()(*large)
    assert (computed - expected).abs().max() <= 2e-6


class Foreign(nn.Module):
    def forward(self, weight):
        return weight * 2


def test_other_parametrizations_keep_their_effect(operators):
    """Apple's export drops those that come before the simulator."""
    model = mlp()
    made = quantizer(model, {"granularity": CHANNELS})
    chain = model[0].parametrizations.weight
    chain.insert(0, Foreign())
    chain.append(Foreign())
    expected = output(model)
    assert torch.equal(output(made.finalize()), expected)
    assert [type(each).__name__ for each in chain] == ["DequantizedWeight", "Foreign"]


def test_weight_norm_before_the_simulator(operators):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 32)))
    spec = QuantizationSpec(granularity=CHANNELS)
    simulator = QuantizationComponentFactory.construct(spec, CompressionTargetTensor.WEIGHT)
    parametrize.register_parametrization(model[0], "weight", simulator, unsafe=True)
    expected = output(model)
    finalize_eager(model, ExportBackend.CoreAI)
    assert torch.equal(output(model), expected)
    state = model.state_dict()
    assert state["0.parametrizations.weight.original"].shape == (0,)
    assert not any("original0" in name for name in state)


def test_weights_that_are_compressed_already_are_left_as_they_are(operators):
    from tests.coreai_opt.export.models import palettizer

    model = mlp()
    palettizer(model, n_bits=4).finalize()
    before = dict(model.state_dict())
    Quantizer(model, QuantizerConfig(execution_mode="eager")).prepare(example(model))
    kept = {name: value for name, value in model.state_dict().items() if "parametrizations" in name}
    assert kept.keys() == {name for name in before if "parametrizations" in name}


BOTH = (ExportBackend.CoreAI, ExportBackend.CoreML)
NVFP4 = {
    "dtype": "float4_e2m1fn",
    "scale_dtype": "float8_e4m3fn",
    "granularity": PerBlockGranularity(axis=1, block_size=16),
}
REFUSED = {
    "int4 activations": (
        None, {"dtype": "int4"}, {ExportBackend.CoreAI: ValueError},
    ),
    "dynamic": (
        None, {"qparam_calculator_cls": DynamicQParamsCalculator},
        {ExportBackend.CoreAI: NotImplementedError},
    ),
    **{
        dtype: ({"dtype": dtype}, None, dict.fromkeys(BOTH, NotImplementedError))
        for dtype in ("int3", "int5", "int6", "int7", "uint6")
    },
    "nvfp4": (NVFP4, None, dict.fromkeys(BOTH, NotImplementedError)),
    "mxint8": (
        {"scale_dtype": "float8_e8m0fnu", "granularity": PerBlockGranularity(axis=1, block_size=32)}, None,
        {ExportBackend.CoreAI: NotImplementedError, ExportBackend.CoreML: NotImplementedError},
    ),
    "float4 in other blocks": (
        {"dtype": "float4_e2m1fn", "granularity": PerBlockGranularity(axis=1, block_size=16)}, None,
        {ExportBackend.CoreAI: ValueError},
    ),
    "float4 activations": (None, {"dtype": "float4_e2m1fn"}, {ExportBackend.CoreAI: ValueError}),
    "activations in blocks": (
        None, {"granularity": PerBlockGranularity(axis=1, block_size=8)}, {ExportBackend.CoreAI: ValueError},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_and_changes_nothing(case):
    weight, activation, errors = REFUSED[case]
    for backend, error in errors.items():
        model = mlp()
        made = quantizer(model, weight or {"granularity": CHANNELS}, activation)
        before, expected = {**model.state_dict()}, output(model)
        with pytest.raises(error, match=r"finalize: .*'|CoreML export does not support"):
            made.finalize(backend=backend)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert torch.equal(output(model), expected)
        made.finalize(backend=ExportBackend.Torch)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    model = mlp()
    made = quantizer(model, {"granularity": CHANNELS})
    expected = output(model)
    for name in [*sys.modules]:
        if name.partition(".")[0] == "coreai_torch":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "coreai_torch", None)
    with pytest.raises(ImportError, match=r"pip install 'coreai-opt-fused\[coreai\]'") as raised:
        made.finalize()
    assert isinstance(raised.value.__cause__, ImportError)
    assert torch.equal(output(model), expected)


def test_granularities_of_other_packages_are_finalized_by_their_handlers(operators, monkeypatch):
    class Rows(PerBlockGranularity):
        pass

    granularity = Rows(axis=1, block_size=8)
    monkeypatch.setattr(handlers, "_eager", {})
    model = mlp()
    made = quantizer(model, None, {"granularity": granularity})
    with pytest.raises(ValueError, match="handler for Rows"):
        made.finalize()
    seen = []
    handlers.register_eager_activation_export_handler(Rows, lambda each: seen.append(each) or nn.Identity())
    assert handlers.has_activation_export_handler(model[0].linear_quantize_input)
    made.finalize()
    assert len(seen) == 4
    assert isinstance(model[0].linear_quantize_input, nn.Identity)


def test_nothing_compressed_is_no_error(operators):
    model = mlp()
    expected = output(model)
    assert torch.equal(output(quantizer(model, None).finalize()), expected)
