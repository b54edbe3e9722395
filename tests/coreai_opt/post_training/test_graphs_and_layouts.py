"""Post-training algorithms on graphs, and on weights whose inputs come first: the same choice as ever."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coreai_opt
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.post_training import GPTQ, AdaRound
from coreai_opt.quantization.post_training._capture import columns_of
from coreai_opt.quantization.post_training._layers import Layer
from coreai_opt.quantization.spec import PerChannelGranularity, QuantizationSpec

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.LayerNorm(128)
        self.fc = nn.Linear(128, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.up(F.relu(self.down(x))))
        return self.head(F.relu(self.fc(self.norm(x.flatten(1)))))


def by_channel(axis):
    spec = QuantizationSpec(dtype="int4", granularity=PerChannelGranularity(axis=axis))
    return ModuleQuantizerConfig(op_input_spec=None, op_output_spec=None, op_state_spec={"weight": spec})


def prepared(mode, model, example=X):
    config = QuantizerConfig(
        global_config=by_channel(0),
        module_type_configs={nn.ConvTranspose2d: by_channel(1), nn.LayerNorm: None},
        execution_mode=mode,
    )
    quantizer = Quantizer(model, config)
    return quantizer.prepare((example,)), quantizer


def error(model, float_model, x=X):
    with torch.no_grad():
        return (model(x) - float_model(x)).norm()


@pytest.mark.parametrize(
    "algorithm",
    [
        "gptq",
        GPTQ(act_order=False),
        AdaRound(iterations=20),
        "awq",
        "smoothquant",
        "bias_correction",
        "cross_layer_equalization",
        ["awq", "gptq"],
    ],
    ids=str,
)
def test_both_modes_choose_the_same(algorithm):
    torch.manual_seed(0)
    network = Network().eval()
    found = {}
    for mode in ("eager", "graph"):
        model, quantizer = prepared(mode, copy.deepcopy(network))
        left_out = quantizer.calibrate([X[:8], X[8:]], algorithm)
        with torch.no_grad():
            found[mode] = model(X), dict(left_out)
            final = quantizer.finalize(backend="torch")(X)
            assert torch.allclose(final, model(X), atol=1e-6)
    assert found["graph"][1] == found["eager"][1]
    torch.testing.assert_close(found["graph"][0], found["eager"][0], rtol=1e-4, atol=1e-5)


def test_activations_of_graphs_are_calibrated_as_well():
    torch.manual_seed(0)
    network = Network().eval()
    quantizer = Quantizer(copy.deepcopy(network), QuantizerConfig())
    model = quantizer.prepare((X[:8] / 10,))
    narrow = error(model, network)
    assert quantizer.calibrate([X], "gptq") == {}
    assert error(model, network) < narrow / 2


def test_attention_is_treated_in_graph_mode():
    torch.manual_seed(0)
    network = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(8, 6, 32)
    errors = []
    for algorithm in (None, "gptq"):
        model, quantizer = prepared("graph", copy.deepcopy(network), x)
        assert quantizer.calibrate([x], algorithm) == {}
        assert any("in_proj_weight" in each.name for each in quantizer.summary().tensors if each.bits)
        errors.append(error(model, network, x))
    assert errors[1] < errors[0]


def test_a_folded_batch_norm_is_named():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    _, quantizer = prepared("graph", network)
    left_out = quantizer.calibrate([X], "gptq")
    assert len(left_out) == 1
    assert "fuse these before prepare" in next(iter(left_out.values()))


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        (1, {}),
        (1, {"stride": 3, "padding": 2, "dilation": 2}),
        (2, {"stride": (2, 1), "padding": 1}),
        (2, {"stride": 2, "padding": 2, "dilation": (1, 2)}),
        (3, {"stride": 2}),
    ],
)
def test_columns_of_transposed_convolutions(axes, settings):
    """Output channels are sums over the columns, with the weight's inputs and kernel in their order."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 5, *(3, 2, 4)[:axes], generator=generator))
    given = torch.randn(2, 3, *(4, 5, 3)[:axes], generator=generator)
    expected = getattr(F, f"conv_transpose{axes}d")(given, weight, **settings)
    layer = Layer("weight", nn.Module(), None, weight, f"conv_transpose{axes}d", settings)
    columns = columns_of(layer, given)[0]
    found = columns @ layer.outputs_first(weight).reshape(5, -1).t()
    torch.testing.assert_close(found, expected.movedim(1, -1).reshape(-1, 5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["gptq", AdaRound(iterations=20), "awq", "bias_correction"], ids=str)
def test_transformers_conv1d_is_a_linear_layer(algorithm):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 16), Conv1D(16, 64)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    x = torch.randn(4, 20, 8) @ torch.randn(8, 64) + torch.randn(4, 20, 64) / 10
    found = []
    for layer in (linear, conv):
        network = nn.Sequential(nn.LayerNorm(64), layer)
        model, quantizer = coreai_opt.quantize(network, [x], "w4")
        assert quantizer.calibrate([x], algorithm) == {}
        with torch.no_grad():
            found.append(model(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_linear_layer_that_is_written_out():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8, bias=False)

        def forward(self, x):
            return x @ self.fc.weight.T

    torch.manual_seed(0)
    network, x = Written(), torch.randn(64, 16)
    plain, _ = prepared("eager", copy.deepcopy(network), x)
    model, quantizer = prepared("eager", copy.deepcopy(network), x)
    assert quantizer.calibrate([x], "gptq") == {}
    assert error(model, network, x) < error(plain, network, x)
