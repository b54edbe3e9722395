import pytest
import torch
from pydantic import ValidationError

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationGranularity,
    resolve_block_sizes,
)

WEIGHT, ACTIVATION, LUT = (
    CompressionTargetTensor.WEIGHT,
    CompressionTargetTensor.ACTIVATION,
    CompressionTargetTensor.LUT,
)


@pytest.mark.parametrize("shape", [(), (5,), (4, 6, 8)])
def test_per_tensor_is_one_block(shape):
    assert PerTensorGranularity().get_block_size(torch.Size(shape)) == shape


@pytest.mark.parametrize(
    ("axis", "expected"), [(0, (1, 6, 8)), (1, (4, 1, 8)), (-1, (4, 6, 1)), (-3, (1, 6, 8))]
)
@pytest.mark.parametrize("target", [WEIGHT, ACTIVATION, LUT])
def test_per_channel_spans_the_other_axes(axis, expected, target):
    assert PerChannelGranularity(axis=axis).get_block_size(torch.Size((4, 6, 8)), target) == expected


@pytest.mark.parametrize(
    "granularity", [PerChannelGranularity(axis=2), PerBlockGranularity(axis=-3, block_size=2)]
)
def test_an_axis_that_the_tensor_lacks(granularity):
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\) .*got -?\d"):
        granularity.get_block_size(torch.Size((4, 6)))


@pytest.mark.parametrize("granularity", [PerChannelGranularity(), PerBlockGranularity(block_size=2)])
def test_an_axis_that_is_needed(granularity):
    with pytest.raises(ValueError, match="axis"):
        granularity.get_block_size(torch.Size((4, 6)))


@pytest.mark.parametrize(
    ("target", "axis", "expected"),
    [
        (WEIGHT, 0, (2, 1, 6, 8)),
        (WEIGHT, 1, (1, 2, 6, 8)),
        (WEIGHT, 2, (1, 1, 2, 8)),
        (WEIGHT, -1, (1, 1, 6, 2)),
        (LUT, 1, (1, 2, 6, 8)),
        (ACTIVATION, 0, (2, 1, 1, 1)),
        (ACTIVATION, 1, (1, 2, 1, 1)),
        (ACTIVATION, -1, (1, 1, 1, 2)),
    ],
)
def test_blocks_along_one_axis(target, axis, expected):
    granularity = PerBlockGranularity(axis=axis, block_size=2)
    assert granularity.get_block_size(torch.Size((2, 4, 6, 8)), target) == expected


def test_blocks_along_the_axis_of_a_vector():
    assert PerBlockGranularity(axis=0, block_size=2).get_block_size(torch.Size((6,))) == (2,)


@pytest.mark.parametrize(("block_size", "expected"), [((2, 3), (2, 3)), ((-1, 3), (4, 3)), ((2, -1), (2, 6))])
@pytest.mark.parametrize("target", [WEIGHT, ACTIVATION])
def test_blocks_of_any_shape(block_size, expected, target):
    granularity = PerBlockGranularity(block_size=block_size)
    assert granularity.get_block_size(torch.Size((4, 6)), target) == expected


def test_blocks_of_any_shape_take_no_axis():
    with pytest.raises(ValueError, match="axis must be None"):
        PerBlockGranularity(axis=1, block_size=(2, 3)).get_block_size(torch.Size((4, 6)))


def test_a_block_that_does_not_divide():
    with pytest.raises(ValueError, match=r"size 6 of axis 1 is not divisible by .*block size 4"):
        PerBlockGranularity(axis=-1, block_size=4).get_block_size(torch.Size((4, 6)))


@pytest.mark.parametrize(
    ("block_sizes", "message"),
    [
        ((2, 4), "size 6 of axis 1 is not divisible by .*block size 4"),
        ((3,), r"block_size must have one entry per dimension, 2 .*got \(3,\)"),
        ((2, 0), r"block_size\[1\] must be positive or -1 for the whole axis, got 0"),
        ((-2, 3), r"block_size\[0\] must be positive or -1"),
    ],
)
def test_resolve_block_sizes_errors(block_sizes, message):
    with pytest.raises(ValueError, match=message):
        resolve_block_sizes((4, 6), block_sizes)


def test_resolve_block_sizes():
    assert resolve_block_sizes(torch.Size((4, 6)), (-1, 3)) == [4, 3]
    assert resolve_block_sizes((), ()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"axis": 1, "block_size": 0},
        {"block_size": -1},
        {"block_size": (0, 2)},
        {},
        {"block_size": 2, "size": 1},
    ],
)
def test_fields_are_validated(fields):
    with pytest.raises(ValidationError):
        PerBlockGranularity(**fields)


def test_fields_are_validated_elsewhere_too():
    with pytest.raises(ValidationError):
        PerTensorGranularity(axis=0)
    with pytest.raises(ValidationError):
        PerChannelGranularity(axis=1.5)
    with pytest.raises(ValidationError, match="frozen"):
        PerChannelGranularity(axis=0).axis = 1


@pytest.mark.parametrize(
    ("granularity", "data"),
    [
        (PerTensorGranularity(), {"axis": None, "type": "per_tensor"}),
        (PerChannelGranularity(axis=-1), {"axis": -1, "type": "per_channel"}),
        (PerBlockGranularity(block_size=(2, -1)), {"axis": None, "block_size": (2, -1), "type": "per_block"}),
    ],
)
def test_dict_round_trip(granularity, data):
    assert granularity.model_dump() == data
    assert QuantizationGranularity.maybe_build_from_dict(data) == granularity
    assert hash(QuantizationGranularity.maybe_build_from_dict(data)) == hash(granularity)


def test_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        QuantizationGranularity()


def test_user_granularity_in_a_spec(registration, make, x):
    @registration(QuantizationGranularity, "per_row")
    class PerRow(QuantizationGranularity):
        def _get_block_size(self, block_sizes_list, quantization_target=WEIGHT):
            return [1, *block_sizes_list[1:]]

    assert PerRow().model_dump() == {"axis": None, "type": "per_row"}
    module = make(granularity={"type": "per_row"})
    assert torch.equal(module(x), make(granularity=PerChannelGranularity(axis=0))(x))
