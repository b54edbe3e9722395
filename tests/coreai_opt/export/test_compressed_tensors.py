"""Weights in the formats of compressed-tensors, which that package decompresses to the same values."""

import pytest
import torch

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.export.compressed_tensors import decoded, pack_words, parameters_of, stored, unpack_words
from coreai_opt.export.two_level_scales import joined, split
from coreai_opt.quantization._export_records import affine_weight
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)

CHANNELS = PerChannelGranularity(axis=0)
GROUPS = PerBlockGranularity(axis=1, block_size=32)
POWERS = "float8_e8m0fnu"
NVFP4 = {
    "dtype": "float4_e2m1fn",
    "scale_dtype": "float8_e4m3fn",
    "granularity": PerBlockGranularity(axis=1, block_size=16),
}


def layer(fields, dtype=torch.float32, shape=(48, 96), with_activations=False):
    """A quantized random matrix as stored, and its record."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    simulator = QuantizationComponentFactory.construct(
        QuantizationSpec(**fields), CompressionTargetTensor.WEIGHT
    )
    simulator(weight)
    record = affine_weight(simulator, weight)
    return stored(record, "layer.weight", with_activations), record


def dense(record):
    """The record's values, in float64, from which results in all narrower dtypes follow."""
    if record.dtype == torch.float4_e2m1fn_x2:
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        codes = torch.stack((record.values & 15, record.values >> 4), -1).flatten(-2).long()
        values = table[codes & 7] * torch.where(codes > 7, -1, 1)
    else:
        values = record.values.double()
    scale, zero_point = record.scale.double(), record.zero_point
    if record.scale_of_tensor is not None:  # readers divide in float32
        scale = (record.scale.float() / record.scale_of_tensor).double()
    blocks = [size // count for size, count in zip(values.shape, scale.shape, strict=True)]
    ones = torch.ones(blocks, dtype=torch.float64)
    offset = 0 if zero_point is None else torch.kron(zero_point.double(), ones)
    return (values - offset) * torch.kron(scale, ones)


CASES = {
    "int4 in groups": ({"dtype": "int4", "granularity": GROUPS}, "pack-quantized"),
    "uint4 in groups, asymmetric": (
        {"dtype": "uint4", "qscheme": "asymmetric", "granularity": GROUPS}, "pack-quantized",
    ),
    "int3 per channel": ({"dtype": "int3", "granularity": CHANNELS}, "pack-quantized"),
    "int2 per channel": ({"dtype": "int2", "granularity": CHANNELS}, "pack-quantized"),
    "int6 per tensor": ({"dtype": "int6"}, "pack-quantized"),
    "int4 per tensor, asymmetric": ({"dtype": "int4", "qscheme": "asymmetric"}, "pack-quantized"),
    "int8 per channel": ({"granularity": CHANNELS}, "pack-quantized"),
    "int8 per tensor, asymmetric": ({"qscheme": "asymmetric"}, "int-quantized"),
    "uint8 in groups, asymmetric": (
        {"dtype": "uint8", "qscheme": "asymmetric", "granularity": GROUPS}, "int-quantized",
    ),
    "clipping": ({"qscheme": "symmetric_with_clipping", "granularity": CHANNELS}, "pack-quantized"),
    "float8 per tensor": ({"dtype": "float8_e4m3fn"}, "float-quantized"),
    "float8 per channel": ({"dtype": "float8_e4m3fn", "granularity": CHANNELS}, "float-quantized"),
    "float8 in blocks": (
        {"dtype": "float8_e4m3fn", "granularity": PerBlockGranularity(block_size=(16, 32))},
        "float-quantized",
    ),
    "mxfp8": ({"dtype": "float8_e4m3fn", "scale_dtype": POWERS, "granularity": GROUPS}, "mxfp8-quantized"),
    "mxfp4": ({"dtype": "float4_e2m1fn", "granularity": GROUPS}, "mxfp4-pack-quantized"),
    "nvfp4": (NVFP4, "nvfp4-pack-quantized"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_decompressed_by_the_package_and_by_us_bit_for_bit(case, dtype):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    fields, fmt = CASES[case]
    saved, record = layer(fields, dtype)
    assert saved.format == fmt
    arguments = QuantizationArgs(**saved.arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(fmt)
    theirs = compressor.decompress(dict(saved.tensors), scheme)["weight"]
    ours = decoded(saved.tensors, fmt, saved.arguments, "layer")
    if fmt == "nvfp4-pack-quantized":  # the package rounds the result, whatever the model's dtype
        assert torch.equal(ours.to(torch.bfloat16), theirs)
    else:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert torch.equal(ours, dense(record).to(ours.dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_packed_words(bits, columns):
    generator = torch.Generator().manual_seed(bits * columns)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    values = torch.randint(low, high, (5, columns), generator=generator).to(torch.int8)
    packed = pack_words(values, bits)
    assert packed.shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpack_words(packed, bits, columns), values)
    package = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    assert torch.equal(package.pack_to_int32(values, bits), packed)


def test_zero_points_of_groups_come_back():
    saved, record = layer({"dtype": "uint4", "qscheme": "asymmetric", "granularity": GROUPS})
    scale, zero_point = parameters_of(saved.tensors, saved.format, saved.arguments)
    assert torch.equal(scale, record.scale)
    assert torch.equal(zero_point.int(), record.zero_point.int() - 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_gives_the_simulated_weights(dtype):
    """To the last bit of float32 in the scales: readers divide by the reciprocal of the tensor's scale."""
    torch.manual_seed(1)
    weight = torch.randn((64, 96), dtype=dtype)
    simulator = QuantizationComponentFactory.construct(
        QuantizationSpec(**NVFP4), CompressionTargetTensor.WEIGHT
    )
    expected = simulator(weight)
    saved = stored(affine_weight(simulator, weight), "layer.weight", False)
    assert {name: each.dtype for name, each in saved.tensors.items()} == {
        "weight_packed": torch.uint8,
        "weight_scale": torch.float8_e4m3fn,
        "weight_global_scale": torch.float32,
    }
    ours = decoded(saved.tensors, saved.format, saved.arguments, "layer").to(dtype)
    different = ours != expected
    assert different.float().mean() < (0.01 if dtype == torch.bfloat16 else 0.3)
    torch.testing.assert_close(ours, expected, rtol=2.0 ** (-7 if dtype == torch.bfloat16 else -22), atol=0)
    if dtype == torch.float32:
        assert torch.equal(ours.bfloat16(), expected.bfloat16())


def test_nvfp4_of_a_model_that_was_cast():
    """Its scales are rounded; what is stored are those from before."""
    torch.manual_seed(1)
    weight = torch.randn(64, 96)
    simulator = QuantizationComponentFactory.construct(
        QuantizationSpec(**NVFP4), CompressionTargetTensor.WEIGHT
    )
    expected = simulator(weight)
    cast = stored(affine_weight(simulator.bfloat16(), weight.bfloat16()), "layer.weight", False)
    found = decoded(cast.tensors, cast.format, cast.arguments, "layer")
    assert ((found - expected).abs() > 0.01 * expected.abs()).float().mean() < 0.01


def test_scales_that_are_not_of_two_levels_are_told():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"scales of 'layer\.weight' are not e4m3 numbers times one number"):
        split(torch.rand(8, 4) + 0.5, "layer.weight")


@pytest.mark.parametrize("largest", [448.0, 416.0, 30.0, 0.001953125])
def test_scales_split_whatever_the_largest_block(largest):
    """Checkpoints of others share the tensor's scale between layers: their largest block need not be 448."""
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    blocks = codes[codes <= largest]
    scale = blocks / 3.7e4
    found, of_tensor = split(scale, "w")
    assert torch.equal(joined(found, of_tensor), scale)


REFUSED = {
    "minimum": ({"qformulation": "minval"}, (48, 96), False, "minval"),
    "convolution": ({}, (8, 8, 3, 3), False, "matrices"),
    "integers in square blocks": (
        {"granularity": PerBlockGranularity(block_size=(16, 32))}, (48, 96), False, "3 x 3 blocks",
    ),
    "e5m2": ({"dtype": "float8_e5m2"}, (48, 96), False, "e4m3"),
    "float4 in other groups": (
        {"dtype": "float4_e2m1fn", "granularity": PerBlockGranularity(axis=1, block_size=16)}, (48, 96),
        False, "groups of 32",
    ),
    "nvfp4 in other groups": (
        {**NVFP4, "granularity": PerBlockGranularity(axis=1, block_size=32)}, (48, 96), False, "groups of 16",
    ),
    "int4 with activations": ({"dtype": "int4"}, (48, 96), True, "4 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused(case):
    fields, shape, with_activations, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        layer(fields, shape=shape, with_activations=with_activations)


def test_unknown_formats_and_missing_tensors_are_told():
    saved, _ = layer({"dtype": "int4", "granularity": GROUPS})
    with pytest.raises(ValueError, match="'marlin-24'"):
        decoded(saved.tensors, "marlin-24", saved.arguments, "layer")
    del saved.tensors["weight_packed"]
    with pytest.raises(ValueError, match="weight_packed"):
        decoded(saved.tensors, saved.format, saved.arguments, "layer")
