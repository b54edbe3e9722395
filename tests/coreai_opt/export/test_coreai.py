"""Finalized models as Core AI programs: their operations and constants, and what they compute."""

import pytest
import torch
from torch import nn

from coreai_opt.palettization.spec import PerGroupedChannelGranularity
from coreai_opt.pruning.spec import BlockStructured, ChannelStructured, NMStructured
from coreai_opt.quantization.spec import PerBlockGranularity, PerChannelGranularity, QuantizationSpec
from tests.coreai_opt.export import core_ai, models
from tests.coreai_opt.export.models import cnn, example, mlp, output, palettizer, pruner, quantizer

pytest.importorskip("coreai_torch", reason="needs the extra coreai")

CHANNELS = PerChannelGranularity(axis=0)
BLOCKS_8 = PerBlockGranularity(axis=1, block_size=8)
BLOCKS_32 = PerBlockGranularity(axis=1, block_size=32)
INT8 = QuantizationSpec(dtype="int8")
SHIFT, LUT = "blockwise_shift_scale", "lut_to_dense"
SPARSE = {"build_sparse_with_bitmask": 2, "sparse_with_bitmask_to_dense": 2}


def check(compressor, model, operations, constants, folder, tolerance=1e-6):
    """In torch and as a program, the finalized model computes what the prepared one does.

    But for the order in which the runtime adds products, up to 288: the machine's instruction set decides it.
    """
    expected = output(model)
    finalized = compressor.finalize()
    assert (output(finalized) - expected).abs().max() <= 1.2e-7
    program = core_ai.convert(finalized, example(finalized))
    found = core_ai.operations(program)
    compression = {
        name: found[name] for name in found if name in (SHIFT, LUT, "quantize", "dequantize", *SPARSE)
    }
    assert compression == operations
    types = core_ai.constants(program)
    assert set(constants) <= set(types), types
    computed = core_ai.run(program, example(finalized), folder)
    assert (computed - expected).abs().max() <= tolerance


QUANTIZED = {
    "1 int8 per channel": (
        mlp, {"granularity": CHANNELS}, None, {SHIFT: 2},
        ["32x64xsi8", "32x1xf32", "32x1xsi8", "16x32xsi8", "16x1xf32", "16x1xsi8"],
    ),
    "2 int4 in blocks": (
        cnn, {"dtype": "int4", "granularity": BLOCKS_8}, None, {SHIFT: 2},
        ["32x16x3x3xsi4", "32x2x1x1xf32", "32x2x1x1xsi4", "16x32x3x3xsi4", "16x4x1x1xf32"],
    ),
    "3 int8 weights and activations": (
        mlp, {"granularity": CHANNELS}, {}, {SHIFT: 2, "quantize": 4, "dequantize": 4},
        ["32x64xsi8", "f32", "si8", "si32"],
    ),
    "4a float8": (
        mlp, {"dtype": "float8_e4m3fn"}, None, {SHIFT: 2}, ["32x64xf8E4M3FN", "1x1xf32", "1x1xf8E4M3FN"],
    ),
    "4b float8 with powers of two": (
        mlp,
        {"dtype": "float8_e4m3fn", "scale_dtype": "float8_e8m0fnu", "granularity": BLOCKS_32},
        None, {SHIFT: 2}, ["32x2xf8E8M0FNU", "32x2xf8E4M3FN", "32x2xf32"],
    ),
    "4c float8 activations": (
        mlp, {"granularity": CHANNELS}, {"dtype": "float8_e4m3fn"},
        {SHIFT: 2, "quantize": 4, "dequantize": 4}, ["32x64xsi8", "f32", "f8E4M3FN"],
    ),
    "float8 activations with powers of two": (
        mlp, None, {"dtype": "float8_e5m2", "scale_dtype": "float8_e8m0fnu"},
        {"quantize": 4, "dequantize": 4}, ["f8E8M0FNU"],
    ),
    "5 float4": (
        mlp, {"dtype": "float4_e2m1fn", "granularity": BLOCKS_32}, None, {SHIFT: 2},
        ["32x64xf4E2M1FN", "32x2xf8E8M0FNU", "16x32xf4E2M1FN"],
    ),
    "12a uint4 in blocks": (
        mlp, {"dtype": "uint4", "qscheme": "asymmetric", "granularity": BLOCKS_32}, None, {SHIFT: 2},
        ["32x64xui4", "32x2xf32", "32x2xui4"],
    ),
    "12b int4 with a minimum": (
        mlp, {"dtype": "int4", "qformulation": "minval", "granularity": CHANNELS}, None, {SHIFT: 2},
        ["32x64xsi4", "32x1xsi4", "32x1xf32"],
    ),
    "12c int2": (mlp, {"dtype": "int2", "granularity": CHANNELS}, None, {SHIFT: 2}, ["32x64xsi2"]),
    "clipping with a minimum": (
        mlp,
        {"qscheme": "symmetric_with_clipping", "qformulation": "minval", "granularity": CHANNELS},
        None, {SHIFT: 2}, ["32x64xsi8"],
    ),
    "activations with a minimum": (
        mlp, None, {"dtype": "uint8", "qscheme": "asymmetric", "qformulation": "minval"},
        {"quantize": 4, "dequantize": 4}, ["f32"],
    ),
    "activations per channel": (
        mlp, None, {"granularity": PerChannelGranularity(axis=-1)},
        {"quantize": 4, "dequantize": 4}, ["64xf32", "32xf32"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized(case, tmp_path):
    make, weight, activation, operations, constants = QUANTIZED[case]
    model = make()
    check(quantizer(model, weight, activation), model, operations, constants, tmp_path)


GROUPS, COLUMNS = (PerGroupedChannelGranularity(axis=axis, group_size=8) for axis in (0, 1))
PALETTIZED = {
    "6a": (mlp, {"n_bits": 4}, {LUT: 2}, ["32x64xui4", "1x1x16x1xf32", "16x32xui4", "si16"]),
    "6b groups": (
        cnn, {"n_bits": 4, "granularity": GROUPS}, {LUT: 2},
        ["32x16x3x3xui4", "4x1x1x1x16x1xf32", "2x1x1x1x16x1xf32"],
    ),
    "groups of columns": (
        cnn, {"n_bits": 4, "granularity": COLUMNS}, {LUT: 2}, ["1x2x1x1x16x1xf32", "1x4x1x1x16x1xf32"],
    ),
    "7a int8 tables": (
        mlp, {"n_bits": 4, "lut_qspec": INT8}, {LUT: 2, SHIFT: 2},
        ["32x64xui4", "1x1x16x1xsi8", "1x1xf32", "1x1xsi8"],
    ),
    "uint8 tables": (
        mlp, {"n_bits": 4, "lut_qspec": QuantizationSpec(dtype="uint8", qscheme="asymmetric")},
        {LUT: 2, SHIFT: 2}, ["1x1x16x1xui8", "1x1xui8"],
    ),
    "float8 tables": (
        mlp, {"n_bits": 4, "lut_qspec": QuantizationSpec(dtype="float8_e4m3fn")}, {LUT: 2, SHIFT: 2},
        ["1x1x16x1xf8E4M3FN"],
    ),
    "7b 8 bits of int8": (
        mlp, {"n_bits": 8, "lut_qspec": INT8}, {SHIFT: 2}, ["32x64xsi8", "1x1xf32", "1x1xsi8"],
    ),
    "8 bits of float8": (
        mlp, {"n_bits": 8, "lut_qspec": QuantizationSpec(dtype="float8_e4m3fn")}, {SHIFT: 2},
        ["32x64xf8E4M3FN"],
    ),
    "8a vectors": (mlp, {"n_bits": 4, "cluster_dim": 2}, {LUT: 2}, ["16x64xui4", "1x1x16x2xf32"]),
    "8b scale of channels": (
        mlp, {"n_bits": 4, "enable_per_channel_scale": True}, {LUT: 2, SHIFT: 2},
        ["32x64xui4", "1x1x16x1xf32", "32x1xf32"],
    ),
    "groups, int8 tables, scale of channels": (
        mlp,
        {"n_bits": 4, "granularity": GROUPS, "lut_qspec": INT8, "enable_per_channel_scale": True},
        {LUT: 2, SHIFT: 2}, ["4x1x16x1xsi8", "32x1xf32", "32x1xsi8"],
    ),
    "8 bits of int8 in groups, scale of channels": (
        mlp,
        {"n_bits": 8, "granularity": GROUPS, "lut_qspec": INT8, "enable_per_channel_scale": True},
        {SHIFT: 2}, ["32x64xsi8", "32x1xf32", "16x32xsi8", "16x1xf32"],
    ),
    "columns, int8 tables, scale of channels": (
        mlp,
        {"n_bits": 4, "granularity": COLUMNS, "lut_qspec": INT8, "enable_per_channel_scale": True},
        {LUT: 2, SHIFT: 2}, ["1x8x16x1xsi8", "32x8xf32", "32x8xsi8"],
    ),
    "1 bit": (mlp, {"n_bits": 1}, {LUT: 2}, ["32x64xui1"]),
    "2 bits": (mlp, {"n_bits": 2}, {LUT: 2}, ["32x64xui2"]),
    "6 bits": (mlp, {"n_bits": 6}, {LUT: 2}, ["32x64xui6", "1x1x64x1xf32"]),
    "8 bits": (mlp, {"n_bits": 8}, {LUT: 2}, ["32x64xui8", "1x1x256x1xf32"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PALETTIZED)
def test_palettized(case, tmp_path):
    make, fields, operations, constants = PALETTIZED[case]
    model = make()
    check(palettizer(model, **fields), model, operations, constants, tmp_path)


def test_indices_of_three_bits_are_stored_with_four(tmp_path):
    model = mlp()
    made = palettizer(model, n_bits=3)
    with pytest.warns(UserWarning, match="3 bits are stored with 4"):
        check(made, model, {LUT: 2}, ["32x64xui4", "1x1x16x1xf32"], tmp_path)


@pytest.mark.parametrize("strategy", ["straight_through", "dkm"])
def test_trained_palettes(strategy, tmp_path):
    model = mlp()
    made = palettizer(model, n_bits=2, training_strategy_spec={"type": strategy})
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model.train()
    with made.training_mode():
        for _ in range(3):
            model(*example(model)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            made.step()
    check(made, model, {LUT: 2}, ["32x64xui2", "1x1x4x1xf32"], tmp_path)


PRUNED = {
    "9 half": ({}, ["1024xf32", "32x64xui1", "256xf32", "16x32xui1"]),
    "nothing": ({"sparsity": 0.0}, ["2048xf32"]),
    "everything": ({"sparsity": 1.0}, ["0xf32"]),
    "2 of 4": ({"pruning_scheme": NMStructured(n=2, m=4)}, ["1024xf32", "32x64xui1"]),
    "blocks": ({"pruning_scheme": BlockStructured(block_size=(4, 4))}, ["1024xf32", "32x64xui1"]),
    "channels": ({"pruning_scheme": ChannelStructured(axis=0)}, ["1024xf32", "32x64xui1"]),
}


@pytest.mark.parametrize("case", PRUNED)
def test_pruned(case, tmp_path):
    fields, constants = PRUNED[case]
    model = mlp()
    check(pruner(model, **fields), model, SPARSE, constants, tmp_path)


def test_palettes_then_activations(tmp_path):
    model = mlp()
    palettizer(model, n_bits=4, lut_qspec=INT8).finalize()
    made = quantizer(model, None, {})
    operations = {LUT: 2, SHIFT: 2, "quantize": 4, "dequantize": 4}
    check(made, model, operations, ["32x64xui4", "1x1x16x1xsi8"], tmp_path)


def test_pruning_then_activations(tmp_path):
    model = mlp()
    pruner(model).finalize()
    check(quantizer(model, None, {}), model, {**SPARSE, "quantize": 4, "dequantize": 4}, [], tmp_path)


HALF = {
    "int8": lambda model: quantizer(model, {"granularity": CHANNELS}),
    "int4 in blocks": lambda model: quantizer(model, {"dtype": "int4", "granularity": BLOCKS_8}),
    "float8": lambda model: quantizer(model, {"dtype": "float8_e4m3fn"}),
    "float4": lambda model: quantizer(model, {"dtype": "float4_e2m1fn", "granularity": BLOCKS_32}),
    "palette": lambda model: palettizer(model, n_bits=4),
    "scale of channels": lambda model: palettizer(model, n_bits=4, enable_per_channel_scale=True),
    "pruned": lambda model: pruner(model),
}


@torch.no_grad()
@pytest.mark.parametrize("case", HALF)
def test_half_precision(case, tmp_path, monkeypatch):
    """Compression adds nothing to what Core AI's products in half precision differ by.

    The program computes bit for bit what one with the same weights uncompressed does. Both differ from torch,
    whose products are summed in float32, by how Core AI sums 64 and 32 products in half precision: three
    units of 2**-11 on outputs up to 1, as the uncompressed model without any quantization does.
    """
    model = mlp().half()
    inputs = tuple(each.half() for each in example(model))
    monkeypatch.setattr(models, "example", lambda _: inputs)
    made = HALF[case](model)
    expected = model.eval()(*inputs)
    finalized = made.finalize()
    dense = mlp().half()
    for position in (0, 2):
        dense[position].weight.copy_(finalized[position].weight)
    computed = core_ai.run(core_ai.convert(finalized, inputs), inputs, tmp_path)
    uncompressed = core_ai.run(core_ai.convert(dense, inputs), inputs, tmp_path)
    assert torch.equal(computed, uncompressed)
    assert (dense(*inputs) - expected).abs().max() <= 2**-11
    assert (computed - expected).abs().max() <= 3 * 2**-11


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize(
    ("made", "constant"),
    [
        (lambda model: quantizer(model, {"granularity": CHANNELS}), "64x64xsi8"),
        (lambda model: palettizer(model, n_bits=4), "64x64xui4"),
        (lambda model: pruner(model), "64x64xui1"),
    ],
)
def test_a_tied_weight_is_stored_once(made, constant, tmp_path):
    model = Tied().eval()
    compressor = made(model)
    expected = output(model)
    finalized = compressor.finalize()
    program = core_ai.convert(finalized, example(finalized))
    assert core_ai.constants(program)[constant] == 1
    assert (core_ai.run(program, example(finalized), tmp_path) - expected).abs().max() <= 3e-7
