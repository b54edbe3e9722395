"""From a model to a compressed one in one call, with data in the forms that people have."""

import copy
import logging
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import coreai_opt
from coreai_opt.palettization import KMeansPalettizerConfig
from coreai_opt.pruning import MagnitudePrunerConfig
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig


class Norm(nn.Module):
    """A norm with a product that a quantizer could simulate."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * (x / x.norm(dim=-1, keepdim=True))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 2)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        share = self.gate(x).softmax(-1)
        return sum(share[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Language(nn.Module):
    """Embedding, two layers with norms and experts, and a head, which may have the embedding's weight."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Sequential(Norm(32), Experts()) for _ in range(2))
        self.head = nn.Linear(32, 64, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, scale=None, *, shift=None):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        x = self.head(x)
        x = x if scale is None else x * scale
        return x if shift is None else x + shift


EXPERTS = {f"layers.{layer}.1.experts.{i}.weight" for layer in range(2) for i in range(2)}
IDS = torch.arange(6).reshape(2, 3)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def x(seed=0, rows=4):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def names(result):
    return {each.name for each in result.compressor.summary().compressed}


@pytest.mark.parametrize("scheme", ["w4", "w8", "w8a8", "mxfp4"])
def test_scheme_gives_what_its_configuration_gives(scheme):
    result = coreai_opt.quantize(small(), x(), scheme)
    assert isinstance(result.compressor, Quantizer)
    text = result.config.to_yaml()
    config = QuantizerConfig.from_yaml(_file(text))
    model = small()
    expected = Quantizer(model, config).prepare((x(),))
    assert torch.equal(result.model(x(1)), expected(x(1)))
    assert not torch.equal(result.model(x(1)), small()(x(1)))
    assert result.compressor.summary().activations == (4 if scheme == "w8a8" else 0) or scheme == "w8a8"
    assert (result.compressor.summary().activations > 0) == (scheme == "w8a8")


def _file(text):
    import io

    return io.StringIO(text)


def test_weights_have_the_values_of_their_format():
    model, _ = coreai_opt.quantize(small(), x(), "w4")
    blocks = model[0].weight.detach().reshape(64, 1, 32)
    assert max(len(block.unique()) for block in blocks.flatten(0, 1)) <= 16
    model, _ = coreai_opt.prune(small(), x(), "2:4")
    assert (model[0].weight.reshape(-1, 4) != 0).sum(-1).eq(2).all()
    model, _ = coreai_opt.prune(small(), x(), 0.75)
    assert (model[0].weight == 0).float().mean() == 0.75
    model, _ = coreai_opt.palettize(small(), x(), 2)
    assert max(len(group.unique()) for group in model[0].weight.reshape(4, -1)) <= 4


def test_norms_embeddings_and_routers_are_left_out():
    result = coreai_opt.quantize(Language(), IDS, "w4")
    assert names(result) == EXPERTS | {"head.weight"}
    assert list(result.config.module_name_configs) == [r"layers\.\d+\.\d+\.gate"]
    activations = coreai_opt.quantize(Language(), IDS, "w8a8")
    assert names(activations) == EXPERTS | {"head.weight"}
    assert names(coreai_opt.prune(Language(), IDS, 0.5)) == EXPERTS | {"head.weight"}
    assert names(coreai_opt.palettize(Language(), IDS, 4)) == EXPERTS | {"head.weight"}


def test_head():
    assert names(coreai_opt.quantize(Language(), IDS, head=False)) == EXPERTS
    other = coreai_opt.quantize(Language(), IDS, "mxfp4", head="w8")
    assert str(other.config.module_name_configs["head"].op_state_spec["weight"].dtype) == "torch.int8"
    # The embedding has its weight, and is left out.
    assert names(coreai_opt.quantize(Language(tied=True), IDS)) == EXPERTS
    assert names(coreai_opt.quantize(Language(tied=True), IDS, head=True)) == EXPERTS | {"embedding.weight"}
    pruned, _ = coreai_opt.prune(Language(), IDS, 0.5, head=0.25)
    assert (pruned.head.weight == 0).float().mean() == 0.25


def test_filter():
    seen = []

    def keep(name, module):
        seen.append(name)
        return not (isinstance(module, nn.Linear) and module.out_features == 16)

    result = coreai_opt.quantize(small(), x(), filter_fn=keep)
    assert seen == ["0", "2"]
    assert names(result) == {"0.weight"}
    config = MagnitudePrunerConfig()
    assert names(coreai_opt.prune(small(), x(), config, filter_fn=keep)) == {"0.weight"}
    assert config.module_name_configs == {}


def test_configurations_are_taken_as_they_are():
    config = QuantizerConfig(global_config=ModuleQuantizerConfig.presets.w8(), execution_mode="graph")
    result = coreai_opt.quantize(small(), x(), config)
    assert isinstance(result.model, torch.fx.GraphModule)
    assert names(result) == {"0.weight", "2.weight"}
    assert result.config == config
    palettes = KMeansPalettizerConfig.presets.w8()
    assert coreai_opt.palettize(small(), x(), palettes).config == palettes


@pytest.mark.parametrize(
    "inputs",
    [
        IDS,
        (IDS,),
        {"ids": IDS},
        UserDict(ids=IDS),
        {"ids": IDS, "scale": torch.tensor(2.0)},
        {"ids": IDS, "shift": torch.ones(64)},
        [IDS],
        [(IDS, torch.zeros(2))],
        [{"ids": IDS}],
        DataLoader(TensorDataset(IDS, torch.zeros(2)), batch_size=1),
        ((each, 0) for each in (IDS, IDS)),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("scheme", ["w8", "w8a8"])
def test_forms_of_inputs(inputs, scheme):
    if not isinstance(inputs, torch.Tensor | tuple | dict | UserDict | list | DataLoader):
        inputs = iter([(IDS, 0), (IDS, 0)])
    model, quantizer = coreai_opt.quantize(Language(), inputs, scheme)
    assert len(quantizer.summary().compressed) == 5
    assert model(ids=IDS).shape == (2, 3, 64)
    hooks = model._forward_pre_hooks.values()
    assert not any("keywords_added" in getattr(each, "__qualname__", "") for each in hooks)


def test_keyword_only_input_reaches_the_model():
    """Activations see the range that the input gives them."""

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, *, value, extra):
            return self.layer(value + extra)

    inputs = {"value": x(), "extra": torch.full((32,), 100.0)}
    model, _ = coreai_opt.quantize(Added(), inputs, "w8a8")
    expected = Added()
    expected.load_state_dict(
        {"layer.weight": model.layer.parametrizations.weight.original, "layer.bias": model.layer.bias}
    )
    assert (model(**inputs) - expected(**inputs)).abs().max() < 10
    graph = QuantizerConfig(execution_mode="graph")
    output = expected(**inputs)
    model, _ = coreai_opt.quantize(expected, inputs, graph)
    assert (model(**inputs) - output).abs().max() < 10


def test_calibration_sees_the_batches():
    """The second batch is wider, so that its range must reach the simulators; a third is not read."""
    read = []

    def batches():
        for scale in (1.0, 10.0, 1e6):
            read.append(scale)
            yield x() * scale, torch.zeros(4)

    result = coreai_opt.quantize(small(), batches(), "w8a8", num_batches=2)
    assert read == [1.0, 10.0]
    once = coreai_opt.quantize(small(), x(), "w8a8")
    wide = x() * 3
    error, error_once = ((each.model(wide) - small()(wide)).abs().max() for each in (result, once))
    assert error < error_once
    read.clear()
    coreai_opt.quantize(small(), batches(), "w8")
    assert read == [1.0]


def test_input_fn():
    data = [{"image": x(), "label": 1}]
    result = coreai_opt.quantize(small(), data, input_fn=lambda batch: batch["image"])
    assert names(result) == {"0.weight", "2.weight"}
    with pytest.raises(TypeError, match=r"a batch does not fit Sequential.forward.*input_fn"):
        coreai_opt.quantize(small(), data)


def test_a_palette_for_the_whole_weight_where_groups_do_not_divide_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    for head, colours in ((None, 16), (True, 16), (2, 4)):
        result = coreai_opt.palettize(copy.deepcopy(model), x(), 4, head=head, finalize="torch")
        assert len(result.model[1].weight.unique()) == colours
        assert all(len(rows.unique()) == 16 for rows in result.model[0].weight.split(16))


@pytest.mark.parametrize("call", [coreai_opt.quantize, coreai_opt.prune, coreai_opt.palettize])
def test_finalized_model_has_plain_weights(call):
    model, _ = call(small(), x(), finalize="torch")
    assert not any("parametrizations" in name for name in model.state_dict())
    assert not torch.equal(model[0].weight, small()[0].weight)


def test_n_m_leaves_out_what_it_does_not_divide(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 3, 3))
    with caplog.at_level(logging.INFO, "coreai_opt"):
        result = coreai_opt.prune(model, torch.zeros(1, 3, 8, 8), "2:4")
    assert names(result) == {"1.weight", "2.weight"}
    assert "left out, as 4 does not divide their inputs: 0" in caplog.text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: coreai_opt.quantize(small(), x(), "w4a"),
            ValueError,
            "scheme must be 'w4'.*got 'w4a'.*mean 'w4",
        ),
        (
            lambda: coreai_opt.quantize(small(), x(), 4),
            TypeError,
            "scheme must be a name or a QuantizerConfig",
        ),
        (lambda: coreai_opt.quantize("model", x()), TypeError, "model must be an nn.Module"),
        (lambda: coreai_opt.quantize(small(), 3), TypeError, "inputs must be a tensor.*got int"),
        (lambda: coreai_opt.quantize(small(), []), ValueError, "gives no batch"),
        (lambda: coreai_opt.quantize(small(), [3]), TypeError, "a batch must be a tensor.*got int"),
        (
            lambda: coreai_opt.quantize(small(), {"y": x()}),
            TypeError,
            "inputs does not fit Sequential.forward",
        ),
        (lambda: coreai_opt.quantize(small(), x(), num_batches=0), ValueError, "num_batches must be"),
        (lambda: coreai_opt.quantize(small(), x(), filter_fn="a"), TypeError, "filter_fn must be a function"),
        (lambda: coreai_opt.quantize(small(), x(), QuantizerConfig(), head=False), ValueError, "head=False"),
        (lambda: coreai_opt.quantize(nn.ReLU(), x(), head=False), ValueError, "ReLU has no linear layer"),
        (lambda: coreai_opt.prune(small(), x(), "half"), ValueError, "n:m such as '2:4'; got 'half'"),
        (lambda: coreai_opt.prune(small(), x(), 1.5), ValueError, "between 0 and 1.*got 1.5"),
        (lambda: coreai_opt.prune(small(), x(), None), TypeError, "amount must be"),
        (lambda: coreai_opt.palettize(small(), x(), 5), ValueError, "n_bits must be one of 1, 2, 3, 4, 6, 8"),
        (lambda: coreai_opt.palettize(small(), x(), "4"), TypeError, "n_bits must be an int"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_functions_load_on_first_use():
    assert {"quantize", "prune", "palettize"} <= set(dir(coreai_opt))


@pytest.mark.parametrize("scheme", ["w4", "w8a8"])
def test_projections_of_attention_are_quantized(scheme):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 7, 64)
    expected = model(x).detach()
    model, quantizer = coreai_opt.quantize(model, x, scheme)
    left_out = {each.name for each in quantizer.summary().tensors if each.simulator is None}
    assert all("norm" in name or "bias" in name for name in left_out)
    with quantizer.training_mode():
        model(x).sum().backward()
    assert model.layers[0].self_attn.parametrizations.in_proj_weight.original.grad.abs().sum() > 0
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0.3)


def test_attention_with_three_inputs_is_quantized():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(64, 4, kdim=32, vdim=48, batch_first=True).eval()
    inputs = torch.randn(2, 7, 64), torch.randn(2, 5, 32), torch.randn(2, 5, 48)
    expected = model(*inputs)[0].detach()
    model, _ = coreai_opt.quantize(model, inputs, "w8a8")
    weights = {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert set(model.parametrizations) == weights
    assert set(model.out_proj.parametrizations) == {"weight"}
    torch.testing.assert_close(model(*inputs)[0], expected, rtol=0, atol=0.02)
