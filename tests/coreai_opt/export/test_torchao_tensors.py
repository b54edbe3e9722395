"""Quantized weights as torchao's tensors, for inference in torch."""

import io

import pytest
import torch
from torch import nn

from coreai_opt import ExportBackend
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from tests.coreai_opt.export.models import cnn, example, mlp, output, quantizer

TORCH = ExportBackend.Torch
CHANNELS = PerChannelGranularity(axis=0)
GROUPS = PerBlockGranularity(axis=1, block_size=32)
POWERS = {"dtype": "float8_e4m3fn", "scale_dtype": "float8_e8m0fnu", "granularity": GROUPS}

CASES = {
    "int8 per channel": (mlp, {"granularity": CHANNELS}, "Int8Tensor", 0.3),
    "int8 per tensor": (mlp, {}, "Int8Tensor", 0.3),
    "int8 in groups": (mlp, {"granularity": GROUPS}, "Int8Tensor", 0.3),
    "int8 asymmetric": (
        mlp, {"granularity": CHANNELS, "qscheme": "asymmetric"}, "IntxUnpackedToInt8Tensor", 0.3,
    ),
    "int8 in square blocks": (
        mlp, {"granularity": PerBlockGranularity(block_size=(8, 32))}, "IntxUnpackedToInt8Tensor", 0.3,
    ),
    "int4 in groups": (mlp, {"dtype": "int4", "granularity": GROUPS}, "Int4OpaqueTensor", 0.2),
    "uint4 in groups, asymmetric": (
        mlp, {"dtype": "uint4", "qscheme": "asymmetric", "granularity": GROUPS}, "Int4OpaqueTensor", 0.2,
    ),
    "int4 per channel": (mlp, {"dtype": "int4", "granularity": CHANNELS}, "Int4OpaqueTensor", 0.2),
    "int4 per tensor": (mlp, {"dtype": "int4"}, "IntxUnpackedToInt8Tensor", 0.3),
    "uint8 asymmetric": (
        mlp, {"dtype": "uint8", "qscheme": "asymmetric", "granularity": CHANNELS}, "IntxUnpackedToInt8Tensor",
        0.3,
    ),
    "int3": (mlp, {"dtype": "int3", "granularity": CHANNELS}, "IntxUnpackedToInt8Tensor", 0.3),
    "convolutions": (cnn, {"granularity": CHANNELS}, "IntxUnpackedToInt8Tensor", 0.3),
    "float8 per channel": (mlp, {"dtype": "float8_e4m3fn", "granularity": CHANNELS}, "Float8Tensor", 0.3),
    "float8 e5m2": (mlp, {"dtype": "float8_e5m2"}, "Float8Tensor", 0.3),
    "mxfp8": (mlp, POWERS, "Float8Tensor", 0.4),
}  # fmt: skip


def held_bytes(tensor):
    """Of the tensors that a subclass consists of."""
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


@pytest.mark.parametrize("case", CASES)
def test_the_quantized_model_computes_the_same(case):
    make, weight, kind, share = CASES[case]
    model = make()
    dense = sum(each.nbytes for name, each in model.named_parameters() if name.endswith("weight"))
    made = quantizer(model, weight)
    expected = output(model)
    finalized = made.finalize(backend=TORCH, tensor_subclass=True)
    weights = [each for name, each in finalized.named_parameters() if name.endswith("weight")]
    assert {type(each).__name__ for each in weights} == {kind}
    assert sum(map(held_bytes, weights)) < share * dense
    assert {type(each) for each in finalized} <= {nn.Linear, nn.Conv2d, nn.ReLU}
    torch.testing.assert_close(output(finalized), expected, rtol=1e-5, atol=1e-6)

    saved = io.BytesIO()
    torch.save(finalized.state_dict(), saved)
    saved.seek(0)
    other = make()
    other.load_state_dict(torch.load(saved, weights_only=True), assign=True)
    assert torch.equal(output(other), output(finalized))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["int8 per channel", "int4 in groups", "float8 per channel"])
def test_in_half_precision(case, dtype):
    model = mlp().to(dtype)
    inputs = tuple(each.to(dtype) for each in example(model))
    spec = QuantizationSpec(**CASES[case][1])
    weights = ModuleQuantizerConfig(op_state_spec={"weight": spec}, op_input_spec=None, op_output_spec=None)
    made = Quantizer(model, QuantizerConfig(global_config=weights, execution_mode="eager"))
    made.prepare(inputs)
    with torch.no_grad():
        expected = model.eval()(*inputs)
        finalized = made.finalize(backend=TORCH, tensor_subclass=True)
        found = finalized(*inputs)
    assert found.dtype == dtype
    # Sums of 64 and of 32 products of numbers up to 1, rounded at other places.
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("case", ["int8 per channel", "int4 in groups", "convolutions", "float8 per channel"])
def test_in_graph_mode(case):
    make, weight, kind, _ = CASES[case]
    model = make()
    made = quantizer(model, weight, {}, mode="graph")
    prepared = made._model.eval()
    with torch.no_grad():
        expected = prepared(*example(model))
        finalized = made.finalize(backend=TORCH, tensor_subclass=True)
        found = finalized(*example(model))
    assert {type(each).__name__ for name, each in finalized.named_parameters() if "weight" in name} == {kind}
    assert (found - expected).norm() <= 0.01 * expected.norm()
    with torch.no_grad():
        assert torch.equal(prepared(*example(model)), expected)


class Language(nn.Module):
    """An embedding whose weights a linear layer shares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 64), nn.Linear(64, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("weight", [{"granularity": CHANNELS}, {"dtype": "int4", "granularity": GROUPS}])
def test_a_shared_weight_serves_both_layers(weight):
    model, tokens = Language().eval(), torch.arange(6).reshape(2, 3)
    spec = ModuleQuantizerConfig(
        op_state_spec={"weight": QuantizationSpec(**weight)}, op_input_spec=None, op_output_spec=None
    )
    made = Quantizer(model, QuantizerConfig(global_config=spec, execution_mode="eager"))
    made.prepare((tokens,))
    with torch.no_grad():
        expected = model(tokens)
        made.finalize(backend=TORCH, tensor_subclass=True)
        torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    assert model.head.weight is model.embedding.weight
    assert type(model.head.weight).__name__ == "IntxUnpackedToInt8Tensor"


def transposed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (4, 4, 4)), nn.ConvTranspose2d(4, 4, 2)).eval()


REFUSED = {
    "minimum": (mlp, {"qformulation": "minval"}, r"'0\.weight' has the formulation 'minval'"),
    "float4": (
        mlp,
        {"dtype": "float4_e2m1fn", "granularity": GROUPS},
        r"'0\.weight' is quantized to .*float4",
    ),
    "a float8 convolution": (cnn, {"dtype": "float8_e4m3fn"}, r"'0\.weight' belongs to a Conv2d"),
    "a transposed convolution": (
        transposed,
        {},
        r"'2\.weight' (belongs to a|is read by).*[Cc]onv_?[Tt]ranspose",
    ),
}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_torchao_has_no_tensor_for_is_named_and_nothing_is_changed(case, mode):
    make, weight, message = REFUSED[case]
    model = make()
    made = quantizer(model, weight, mode=mode)
    prepared = made._model.eval()
    with torch.no_grad():
        expected = prepared(*example(model))
    with pytest.raises(ValueError, match=message):
        made.finalize(backend=TORCH, tensor_subclass=True)
    with torch.no_grad():
        assert torch.equal(prepared(*example(model)), expected)
        assert torch.equal(made.finalize(backend=TORCH)(*example(model)), expected)


def test_for_torch_only():
    made = quantizer(mlp(), {})
    with pytest.raises(ValueError, match=r"tensor_subclass is for ExportBackend\.Torch only"):
        made.finalize(tensor_subclass=True)
