"""Finalized models as Core ML models: their operations and constants, and the weights in them."""

import pytest
import torch

from coreai_opt import CoreMLExportError, ExportBackend
from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.pruning.spec import NMStructured
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from tests.coreai_opt.export import core_ml
from tests.coreai_opt.export.models import cnn, example, mlp, output, palettizer, pruner, quantizer
from tests.coreai_opt.export.test_coreai import Tied

pytest.importorskip("coremltools", reason="needs the extra coreml")

COREML = ExportBackend.CoreML
CHANNELS = PerChannelGranularity(axis=0)
BLOCKS_8 = PerBlockGranularity(axis=1, block_size=8)
GROUPS = PerGroupedChannelGranularity(axis=0, group_size=8)
INT8 = QuantizationSpec(dtype="int8")
SHIFT, LUT, SPARSE = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "constexpr_sparse_to_dense"


def check(compressor, model, operations, first_constants, target="iOS18"):
    """The finalized model computes what the prepared one does; converted, it holds the same weights."""
    expected = output(model)
    finalized = compressor.finalize(backend=COREML)
    assert torch.equal(output(finalized), expected)
    converted = core_ml.convert(finalized, example(finalized), target)
    found = core_ml.operations(converted)
    for plain in ("linear", "conv", "relu"):
        found.pop(plain, None)
    assert found == operations
    for name, constants in first_constants.items():
        assert core_ml.constants(converted, name)[0].items() >= constants.items()
    weights = [value for name, value in finalized.named_parameters() if name.endswith("weight")]
    for held, weight in zip(core_ml.weights(converted), weights, strict=True):
        assert (held - weight).abs().max() <= 1.3e-4  # half precision of scale and product


def quantized(make, weight, activation=None):
    model = make()
    return quantizer(model, weight, activation), model


def palettized(make=mlp, **fields):
    model = make()
    return palettizer(model, **fields), model


def pruned(make=mlp, **fields):
    model = make()
    return pruner(model, **fields), model


def palettes_then_activations():
    model = mlp()
    palettizer(model, n_bits=4, lut_qspec=INT8).finalize(backend=COREML)
    return quantizer(model, None, {}), model


def pruning_then_weights():
    model = mlp()
    pruner(model).finalize(backend=COREML)
    return quantizer(model, {"granularity": CHANNELS}), model


CASES = {
    "C1 int8 per channel": (
        lambda: quantized(mlp, {"granularity": CHANNELS}), {SHIFT: 2},
        {SHIFT: {"data": ("int8", (32, 64)), "scale": ("fp16", (32, 1))}},
    ),
    "C1b asymmetric": (
        lambda: quantized(mlp, {"granularity": CHANNELS, "qscheme": "asymmetric"}), {SHIFT: 2},
        {SHIFT: {"offset": ("int8", (32, 1))}},
    ),
    "C2 int4 in blocks": (
        lambda: quantized(cnn, {"granularity": BLOCKS_8, "dtype": "int4"}), {SHIFT: 2},
        {SHIFT: {"data": ("int4", (32, 16, 3, 3)), "scale": ("fp16", (32, 2, 1, 1))}},
    ),
    "C3 int8 weights and activations": (
        lambda: quantized(mlp, {"granularity": CHANNELS}, {}), {SHIFT: 2, "quantize": 4, "dequantize": 4},
        {"quantize": {"scale": ("fp16", ())}},
    ),
    "activations of a clipping scheme": (
        lambda: quantized(mlp, None, {"qscheme": "symmetric_with_clipping"}),
        {"clip": 4, "quantize": 4, "dequantize": 4}, {},
    ),
    "C4": (
        lambda: palettized(n_bits=4), {LUT: 2},
        {LUT: {"indices": ("uint4", (32, 64)), "lut": ("fp16", (1, 1, 16, 1))}},
    ),
    "C4a 1 bit": (lambda: palettized(n_bits=1), {LUT: 2}, {LUT: {"indices": ("uint1", (32, 64))}}),
    "C4a 3 bits": (lambda: palettized(n_bits=3), {LUT: 2}, {LUT: {"indices": ("uint3", (32, 64))}}),
    "C4a 6 bits": (lambda: palettized(n_bits=6), {LUT: 2}, {LUT: {"indices": ("uint6", (32, 64))}}),
    "C4a 8 bits": (lambda: palettized(n_bits=8), {LUT: 2}, {LUT: {"indices": ("uint8", (32, 64))}}),
    "C5 groups": (
        lambda: palettized(cnn, n_bits=4, granularity=GROUPS), {LUT: 2},
        {LUT: {"indices": ("uint4", (32, 16, 3, 3)), "lut": ("fp16", (4, 1, 1, 1, 16, 1))}},
    ),
    "C6 int8 tables": (
        lambda: palettized(n_bits=4, lut_qspec=INT8), {LUT: 2, SHIFT: 2},
        {SHIFT: {"data": ("int8", (1, 1, 16, 1))}},
    ),
    "C7 8 bits of int8": (
        lambda: palettized(n_bits=8, lut_qspec=INT8), {SHIFT: 2},
        {SHIFT: {"data": ("int8", (32, 64)), "scale": ("fp16", (1, 1))}},
    ),
    "C8 vectors": (
        lambda: palettized(n_bits=4, cluster_dim=2), {LUT: 2},
        {LUT: {"indices": ("uint4", (16, 64)), "lut": ("fp16", (1, 1, 16, 2)), "vector_axis": ("int32", ())}},
    ),
    "C8 scale of channels": (
        lambda: palettized(n_bits=4, enable_per_channel_scale=True), {LUT: 2, SHIFT: 2}, {},
    ),
    "C9 pruned": (
        pruned, {SPARSE: 2}, {SPARSE: {"nonzero_data": ("fp16", (1024,)), "mask": ("uint1", (32, 64))}},
    ),
    "2 of 4": (
        lambda: pruned(pruning_scheme=NMStructured(n=2, m=4)), {SPARSE: 2},
        {SPARSE: {"nonzero_data": ("fp16", (1024,))}},
    ),
    "C11 palettes, then activations": (
        palettes_then_activations, {LUT: 2, SHIFT: 2, "quantize": 4, "dequantize": 4}, {},
    ),
    "pruning, then weights": (
        pruning_then_weights, {SPARSE: 2, "constexpr_sparse_blockwise_shift_scale": 2},
        {"constexpr_sparse_blockwise_shift_scale": {"nonzero_data": ("int8", (1024,))}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_content(case):
    prepared, operations, constants = CASES[case]
    check(*prepared(), operations, constants)


def test_for_older_systems():
    made, model = quantized(mlp, {"granularity": CHANNELS})
    name = "constexpr_affine_dequantize"
    check(made, model, {name: 2}, {name: {"scale": ("fp16", (32,))}}, target="iOS16")


def test_metadata():
    _, model = made = quantized(mlp, {"granularity": CHANNELS})
    made[0].finalize(backend=COREML)
    state = model.state_dict()
    expected = {
        "_COREML_/metadata_version": (torch.int64, ()),
        "0._COREML_/weight/compression_type": (torch.int64, (1,)),
        "0._COREML_/weight/quantization_n_bits": (torch.int64, ()),
        "0._COREML_/weight/quantization_scale": (torch.float32, (32, 1)),
        "0._COREML_/weight/zero_point": (torch.int8, (32, 1)),
    }
    found = {name: (value.dtype, tuple(value.shape)) for name, value in state.items() if "_COREML_" in name}
    assert found.items() >= expected.items()
    assert state["0._COREML_/weight/compression_type"].tolist() == [3]
    assert state["_COREML_/metadata_version"] == 1
    assert set(state) - set(found) == set(mlp().state_dict())


@pytest.mark.parametrize(
    "made",
    [
        lambda model: quantizer(model, {"granularity": CHANNELS}),
        lambda model: palettizer(model, n_bits=4),
        lambda model: pruner(model),
    ],
)
def test_all_owners_of_a_tied_weight_have_the_metadata(made):
    """In Apple's package, the second owner of a tied weight keeps its simulator."""
    model = Tied().eval()
    compressor = made(model)
    expected = output(model)
    compressor.finalize(backend=COREML)
    assert torch.equal(output(model), expected)
    assert model.a.weight is model.b.weight
    for owner in (model.a, model.b):
        assert "_COREML_/weight/compression_type" in owner.state_dict()


REFUSED = {
    "float8": (lambda: quantized(mlp, {"dtype": "float8_e4m3fn"}), CoreMLExportError),
    "int2": (lambda: quantized(mlp, {"dtype": "int2"}), CoreMLExportError),
    "uint4 activations": (
        lambda: quantized(mlp, {}, {"dtype": "uint4", "qscheme": "asymmetric"}), CoreMLExportError,
    ),
    "activations per channel": (lambda: quantized(mlp, {}, {"granularity": CHANNELS}), CoreMLExportError),
    "minimum": (lambda: quantized(mlp, {"qformulation": "minval"}), ValueError),
    "float8 tables": (
        lambda: palettized(n_bits=4, lut_qspec=QuantizationSpec(dtype="float8_e4m3fn")), CoreMLExportError,
    ),
    "quantized tables and a scale": (
        lambda: palettized(n_bits=4, lut_qspec=INT8, enable_per_channel_scale=True), CoreMLExportError,
    ),
    "vectors and a scale": (
        lambda: palettized(n_bits=4, cluster_dim=2, enable_per_channel_scale=True), CoreMLExportError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_and_changes_nothing(case):
    prepared, error = REFUSED[case]
    made, model = prepared()
    before, expected = model.state_dict(), output(model)
    with pytest.raises(error, match="CoreML export does not support"):
        made.finalize(backend=COREML)
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(output(model), expected)
    made.finalize(backend=ExportBackend.Torch)
