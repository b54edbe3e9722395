import copy
import pickle

import pytest
import torch
from pydantic import ValidationError

from coreai_opt.common import CompressionType
from coreai_opt.config.spec import CompressionSpec, CompressionTargetTensor
from coreai_opt.quantization import QuantizationSpec
from coreai_opt.quantization.spec import (
    DynamicQParamsCalculator,
    MinMaxRangeCalculator,
    MovingAverageQParamsCalculator,
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QParamsCalculatorBase,
    QuantizationComponentFactory,
    QuantizationFormulation,
    QuantizationScheme,
    StaticQParamsCalculator,
    default_activation_quantization_spec,
    default_weight_quantization_spec,
)

E8M0 = torch.float8_e8m0fnu
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]


def test_defaults():
    spec = QuantizationSpec()
    assert spec.dtype == torch.int8
    assert spec.qscheme is QuantizationScheme.SYMMETRIC
    assert spec.qformulation is QuantizationFormulation.ZP
    assert spec.granularity == PerTensorGranularity()
    assert spec.float_range == [None, None]
    assert spec.scale_dtype is None
    assert spec.fake_quantize_cls.__name__ == "_DefaultFakeQuantizeImpl"
    assert spec.qparam_calculator_cls.__name__ == "_DefaultQParamsCalculator"
    assert spec.range_calculator_cls is MinMaxRangeCalculator
    assert spec.get_compression_type() is CompressionType.QUANTIZATION
    assert spec.get_extra_args() == {}


@pytest.mark.parametrize(
    ("name", "dtype", "bits", "target", "low", "high"),
    [
        ("int2", torch.int2, 2, torch.int8, -2, 1),
        ("int4", torch.int4, 4, torch.int8, -8, 7),
        ("int3", torch.int3, 3, torch.int8, -4, 3),
        ("int5", torch.int5, 5, torch.int8, -16, 15),
        ("int6", torch.int6, 6, torch.int8, -32, 31),
        ("int7", torch.int7, 7, torch.int8, -64, 63),
        ("int8", torch.int8, 8, torch.int8, -128, 127),
        ("uint2", torch.uint2, 2, torch.uint8, 0, 3),
        ("uint4", torch.uint4, 4, torch.uint8, 0, 15),
        ("uint6", torch.uint6, 6, torch.uint8, 0, 63),
        ("uint8", torch.uint8, 8, torch.uint8, 0, 255),
        ("float8_e4m3fn", torch.float8_e4m3fn, 8, torch.float8_e4m3fn, -448.0, 448.0),
        ("float8_e4m3", torch.float8_e4m3fn, 8, torch.float8_e4m3fn, -448.0, 448.0),
        ("float8_e5m2", torch.float8_e5m2, 8, torch.float8_e5m2, -57344.0, 57344.0),
        ("float4_e2m1fn", torch.float4_e2m1fn_x2, 4, torch.float8_e4m3fn, -6.0, 6.0),
        ("float4_e2m1fn_x2", torch.float4_e2m1fn_x2, 4, torch.float8_e4m3fn, -6.0, 6.0),
    ],
)
def test_dtypes(name, dtype, bits, target, low, high):
    spec = QuantizationSpec(dtype=name)
    assert spec == QuantizationSpec(dtype=dtype)
    assert (spec.dtype, spec.n_bits, spec.target_dtype) == (dtype, bits, target)
    assert (spec.quant_min, spec.quant_max) == (low, high)
    assert type(spec.quant_min) is type(low)


@pytest.mark.parametrize(
    "name",
    ["torch.int4", "uint3", "INT8", " int8", "fp4", "float32", "nn", "randn", "foo", None, 8, torch.int16],
)
def test_refused_dtypes(name):
    with pytest.raises(ValidationError):
        QuantizationSpec(dtype=name)


def test_a_refused_dtype_is_answered_with_the_allowed_and_the_nearest():
    with pytest.raises(
        ValidationError, match=r"'torch.int4'.*Did you mean 'int4'.*Allowed dtypes:.*torch\.uint8"
    ):
        QuantizationSpec(dtype="torch.int4")
    with pytest.raises(ValidationError, match=r"Unsupported dtype: torch.uint3.*Allowed dtypes"):
        QuantizationSpec(dtype="uint3")


@pytest.mark.parametrize(
    ("dtype", "clipped", "other"),
    [
        (torch.int4, (-7, 7), (-8, 7)),
        (torch.uint4, (0, 15), (0, 15)),
        (torch.int3, (-3, 3), (-4, 3)),
        (torch.int6, (-31, 31), (-32, 31)),
        (torch.int16, (-32767, 32767), (-32768, 32767)),
        (torch.float8_e5m2, (-57344.0, 57344.0), (-57344.0, 57344.0)),
        (torch.float16, (-65504.0, 65504.0), (-65504.0, 65504.0)),
    ],
)
def test_quant_range(dtype, clipped, other):
    get = QuantizationSpec.get_quant_range
    assert get(dtype, QuantizationScheme.SYMMETRIC_WITH_CLIPPING) == clipped
    assert get(dtype, QuantizationScheme.SYMMETRIC) == other
    assert get(dtype, QuantizationScheme.ASYMMETRIC) == other


@pytest.mark.parametrize(
    ("dtype", "bits", "target"),
    [
        (torch.int1, 1, torch.int8),
        (torch.uint7, 7, torch.uint8),
        (torch.int32, 32, torch.int32),
        (torch.bfloat16, 16, torch.bfloat16),
    ],
)
def test_bits_and_target_dtype(dtype, bits, target):
    assert QuantizationSpec.get_n_bits_from_dtype(dtype) == bits
    assert QuantizationSpec.get_target_dtype(dtype) == target


def test_bits_of_a_dtype_without_a_number():
    with pytest.raises(RuntimeError, match=r"torch\.bool"):
        QuantizationSpec.get_n_bits_from_dtype(torch.bool)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qscheme": "asymmetric"}, "qscheme must be 'symmetric' .*got 'asymmetric'"),
        ({"qscheme": "symmetric_with_clipping"}, "qscheme must be 'symmetric'"),
        ({"qformulation": "minval"}, "qformulation must be 'zp' .*got 'minval'"),
        ({"scale_dtype": torch.float32}, "scale_dtype must be None or .*got torch.float32"),
        ({"scale_dtype": "e8m0"}, "Unsupported dtype: 'e8m0'"),
    ],
)
def test_floating_point_restrictions(dtype, fields, message):
    with pytest.raises(ValidationError, match=message):
        QuantizationSpec(dtype=dtype, **fields)


@pytest.mark.parametrize("scale_dtype", ["float8_e8m0fnu", "float8_e8m0", E8M0])
def test_power_of_two_scales(scale_dtype):
    assert QuantizationSpec(dtype="float8_e4m3fn", scale_dtype=scale_dtype).scale_dtype == E8M0
    assert QuantizationSpec(dtype="int8", scale_dtype=scale_dtype).scale_dtype == E8M0
    with pytest.raises(ValidationError, match=r"got dtype=torch\.int4"):
        QuantizationSpec(dtype="int4", scale_dtype=scale_dtype)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qscheme": "asymmetric"}, r"qscheme must be 'symmetric' for dtype=torch.int8 .*e8m0fnu"),
        ({"qscheme": "symmetric_with_clipping"}, "qscheme must be 'symmetric'"),
        ({"qformulation": "minval"}, r"qformulation must be 'zp' for dtype=torch.int8 .*e8m0fnu"),
    ],
)
def test_int8_with_power_of_two_scales_is_symmetric(fields, message):
    with pytest.raises(ValidationError, match=message):
        QuantizationSpec(dtype="int8", scale_dtype=E8M0, **fields)


def test_of_several_mistakes_the_scale_dtype_is_reported():
    fields = {"qscheme": "asymmetric", "qformulation": "minval", "scale_dtype": torch.float32}
    with pytest.raises(ValidationError, match="scale_dtype must be None") as raised:
        QuantizationSpec(dtype="float8_e4m3fn", **fields)
    assert raised.value.error_count() == 1


def test_float4_has_power_of_two_scales_anyway():
    assert QuantizationSpec(dtype="float4_e2m1fn").scale_dtype == E8M0
    assert QuantizationSpec(dtype="float4_e2m1fn", scale_dtype=None).scale_dtype == E8M0
    assert QuantizationSpec(dtype="float8_e5m2").scale_dtype is None


@pytest.mark.parametrize(
    ("given", "kept"), [([-1, 1], [-1.0, 1.0]), ((None, 2), [None, 2.0]), ([0, None], [0.0, None])]
)
def test_float_range(given, kept):
    assert QuantizationSpec(float_range=given).float_range == kept


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 0], "lower bound of float_range must be below"),
        ([2, 1], "lower bound of float_range must be below"),
        ([1, None], "must contain 0: its lower bound"),
        ([None, -1], "must contain 0: its upper bound"),
        ([-1], "two bounds"),
        (None, "list or tuple"),
        ("ab", "list or tuple"),
        (["-1", "1"], "must be a number, or None"),
        ([-1, True], "must be a number, or None"),
    ],
)
def test_refused_float_ranges(given, message):
    with pytest.raises(ValidationError, match=message):
        QuantizationSpec(float_range=given)


@pytest.mark.parametrize("field", ["fake_quantize_cls", "qparam_calculator_cls", "range_calculator_cls"])
@pytest.mark.parametrize("value", ["foo", int, None, 3, QParamsCalculatorBase])
def test_refused_classes(field, value):
    with pytest.raises(ValidationError, match=r"Its keys|not among the classes"):
        QuantizationSpec(**{field: value})


def test_classes_by_key_and_by_themselves():
    assert QuantizationSpec(qparam_calculator_cls="dynamic").qparam_calculator_cls is DynamicQParamsCalculator
    spec = QuantizationSpec(qparam_calculator_cls=StaticQParamsCalculator)
    assert spec.qparam_calculator_cls is StaticQParamsCalculator


def test_a_dynamic_calculator_does_not_clip():
    with pytest.raises(ValidationError, match="with the dynamic calculator"):
        QuantizationSpec(qparam_calculator_cls="dynamic", qscheme="symmetric_with_clipping")


@pytest.mark.parametrize("granularity", ["per_tensor", None, 3, PerTensorGranularity, {"axis": 1}])
def test_refused_granularities(granularity):
    with pytest.raises(ValidationError):
        QuantizationSpec(granularity=granularity)


def test_an_unknown_granularity_is_a_key_error():
    with pytest.raises(KeyError, match="Did you mean 'per_block'"):
        QuantizationSpec(granularity={"type": "per_blok"})


def test_a_misspelled_field_is_refused():
    with pytest.raises(ValidationError, match="dtyp"):
        QuantizationSpec(dtyp="int4")


def test_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        QuantizationSpec().dtype = torch.int4


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "int4", "granularity": PerBlockGranularity(axis=1, block_size=4), "qscheme": "asymmetric"},
        {"dtype": "float4_e2m1fn"},
        {"float_range": [-1, 2], "qparam_calculator_cls": "moving_average", "qformulation": "minval"},
    ],
)
def test_round_trips(fields):
    spec = QuantizationSpec(**fields)
    dump = spec.model_dump()
    assert set(dump) > {"n_bits", "target_dtype", "quant_min", "quant_max"}
    assert QuantizationSpec.model_validate(dump) == spec
    assert QuantizationSpec(**dump) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec
    assert "n_bits" not in repr(spec)


def test_default_specs():
    weight, activation = default_weight_quantization_spec(), default_activation_quantization_spec()
    assert weight.granularity == PerChannelGranularity(axis=0)
    assert weight.qparam_calculator_cls is StaticQParamsCalculator
    assert activation.granularity == PerTensorGranularity()
    assert activation.qparam_calculator_cls is MovingAverageQParamsCalculator
    assert weight.dtype == activation.dtype == torch.int8


def test_fields_of_a_subclass_reach_the_components():
    class Slow(QuantizationSpec):
        averaging_constant: float = 0.5

    spec = Slow(qparam_calculator_cls="moving_average", averaging_constant=0.25)
    assert spec.get_extra_args() == {"averaging_constant": 0.25}
    module = QuantizationComponentFactory.construct(spec, CompressionTargetTensor.ACTIVATION)
    assert module.qparams_calculator.averaging_constant == 0.25


def test_base_spec():
    with pytest.raises(ValidationError):
        CompressionSpec(a=1)
    with pytest.raises(AttributeError, match="_compression_type"):
        CompressionSpec().get_compression_type()


@pytest.mark.parametrize(
    ("enumeration", "values"),
    [
        (QuantizationScheme, {"symmetric", "asymmetric", "symmetric_with_clipping"}),
        (QuantizationFormulation, {"zp", "minval"}),
        (CompressionTargetTensor, {"weight", "activation", "lut"}),
        (CompressionType, {"quantization", "palettization", "pruning"}),
    ],
)
def test_enumerations(enumeration, values):
    assert {member.value for member in enumeration} == values
    with pytest.raises(ValueError, match="is not a valid"):
        enumeration("foo")


@pytest.mark.parametrize("given", [{"n_bits": 4}, {"quant_min": -127}, {"quant_max": 7}])
def test_a_range_that_does_not_follow_from_the_dtype_is_refused(given):
    """Difference: Ranges of a specification are not ignored."""
    ((field, value),) = given.items()
    with pytest.raises(ValueError, match=f"{field} follows from the dtype.*got {field}={value}"):
        QuantizationSpec(**given)
    assert QuantizationSpec(dtype="int4", n_bits=4, quant_min=-8, quant_max=7).n_bits == 4


@pytest.mark.parametrize("dtype", ["int4", "uint8", "float8_e4m3fn", "float4_e2m1fn_x2"])
def test_a_dump_loads(dtype):
    spec = QuantizationSpec(dtype=dtype)
    assert QuantizationSpec(**spec.model_dump()) == spec
