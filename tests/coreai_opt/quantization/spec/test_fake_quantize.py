import logging

import pytest
import torch
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from coreai_opt.config.spec import CompressionSimulatorBase, CompressionTargetTensor
from coreai_opt.quantization.spec import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationFormulation,
    QuantizationScheme,
    fp4_forward,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

INTEGERS = ["int2", "int4", "int8", "uint2", "uint4", "uint8"]
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]


def test_hierarchy(make):
    module = make()
    for base in (FakeQuantizeImplBase, CompressionSimulatorBase, FakeQuantizeBase):
        assert isinstance(module, base)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
@pytest.mark.parametrize(
    "granularity",
    [PerTensorGranularity(), PerChannelGranularity(axis=0), PerBlockGranularity(axis=1, block_size=4)],
)
def test_forward_is_dequantize_of_quantize(make, x, dtype, granularity):
    module = make(dtype=dtype, granularity=granularity)
    y = module(x)
    qparams = module.calculate_qparams()
    q = module.quantize(x, *qparams)
    assert q.dtype == module.target_dtype
    assert torch.equal(module.dequantize(q, *qparams), y)
    module.disable_observer()
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("qscheme", ["symmetric", "asymmetric", "symmetric_with_clipping"])
@pytest.mark.parametrize("qformulation", ["zp", "minval"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_error_is_at_most_half_a_step_inside_the_range(make, x, qscheme, qformulation, dtype):
    module = make(dtype=dtype, qscheme=qscheme, qformulation=qformulation)
    y = module(x)
    scale, *_ = module.calculate_qparams()
    inside = (y > y.amin()) & (y < y.amax())
    assert ((y - x).abs()[inside] <= 0.5001 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_memory_format_are_kept(make, dtype):
    x = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    y = make()(x)
    assert y.dtype == dtype
    assert y.stride() == x.stride()


def test_scalars(make):
    assert make()(torch.tensor(1.5)).item() == pytest.approx(1.5, abs=0.01)


def test_straight_through_gradient(make, x):
    module = make(float_range=[-1.0, 1.0])
    x.requires_grad_()
    grad = torch.randn_like(x)
    module(x).backward(grad)
    scale, *_ = module.calculate_qparams()
    inside = ((x / scale).round() >= -128) & ((x / scale).round() <= 127)
    assert torch.equal(x.grad, grad * inside)
    assert 0 < inside.sum() < x.numel()


def test_quantize_and_dequantize_differentiate_as_torch_does(make, x):
    module = make()
    module(x)
    qparams = module.calculate_qparams()
    x.requires_grad_()
    module.quantize(x, *qparams, cast_to_target_dtype=False).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    x.grad = None
    module.dequantize(x, *qparams).sum().backward()
    assert torch.equal(x.grad, qparams[0].expand_as(x))


def test_quantized_dtypes(make, x):
    module = make(dtype="int4")
    module(x)
    qparams = module.calculate_qparams()
    q = module.quantize(x.bfloat16(), *qparams, cast_to_target_dtype=False)
    assert q.dtype == torch.bfloat16
    assert torch.equal(q, module.quantize(x.bfloat16(), *qparams).bfloat16())
    assert module.dequantize(q, *qparams, output_dtype=torch.float16).dtype == torch.float16


def test_parameters_that_do_not_fit(make, x):
    module = make()
    module(x)
    scale, zero_point, minval = module.calculate_qparams()
    with pytest.raises(ValueError, match="zero_point must not be None"):
        module.quantize(x, scale, None, minval)
    with pytest.raises(RuntimeError, match=r"scale must have one value for each of the blocks \(1, 1\)"):
        module.quantize(x, torch.ones(2, 2), zero_point, minval)
    with pytest.raises(ValueError, match="must be None for floating-point"):
        make(dtype="float8_e5m2").quantize(x, scale, zero_point, minval)
    assert torch.equal(
        module.quantize(x, scale.squeeze(), zero_point.squeeze(), minval.squeeze()),
        module.quantize(x, scale, zero_point, minval),
    )


def test_switches(make_activation, x):
    module = make_activation()
    module.disable_fake_quant()
    assert module(x) is x
    scale = module.qparams_calculator.scale.clone()
    assert scale.shape == (1, 1)
    module.disable_observer()
    assert module(5 * x) is not x
    module.enable_fake_quant()
    assert "observer=off, fake_quant=on" in repr(module)
    assert not torch.equal(module(5 * x), 5 * x)
    assert torch.equal(module.qparams_calculator.scale, scale)
    module.enable_observer()
    module(5 * x)
    assert not torch.equal(module.qparams_calculator.scale, scale)
    assert module.observer_enabled.tolist() == [1]
    module.enable_observer(False)
    module.enable_fake_quant(False)
    assert module.observer_enabled.tolist() == module.fake_quant_enabled.tolist() == [0]


def test_evaluation_observes_too(make_activation, x):
    module = make_activation().eval()
    module(x)
    assert module.qparams_calculator.scale.shape == (1, 1)


def test_observation_off_before_anything_was_observed(make, x):
    module = make()
    module.disable_observer()
    with (
        pytest.warns(UserWarning, match="no tensor has been observed"),
        pytest.raises(RuntimeError, match="observ"),
    ):
        module(x)


@pytest.mark.parametrize("fake_quant", [True, False])
def test_blocks_that_do_not_divide_disable(make, x, caplog, fake_quant):
    module = make(granularity=PerBlockGranularity(axis=1, block_size=3))
    module.tensor_fqn = "layer.weight"
    module.enable_fake_quant(fake_quant)
    with caplog.at_level(logging.WARNING):
        assert module(x) is x
        assert module(x) is x
    (record,) = caplog.records
    for part in ("'layer.weight'", "WEIGHT", "(4, 8)", "axis 1 is not divisible by the block size 3"):
        assert part in record.getMessage()
    assert module.is_disabled()
    assert module._disabled.item() is True
    module._disabled.fill_(False)
    assert module(torch.randn(4, 9)) is not None
    assert not module.is_disabled()
    assert module.qparams_calculator.scale.shape == (4, 3)


def test_other_misfits_are_errors(make, x):
    with pytest.raises(ValueError, match="one entry per dimension"):
        make(granularity=PerBlockGranularity(block_size=(2, 2, 2)))(x)
    with pytest.raises(ValueError, match="axis must be in"):
        make(granularity=PerChannelGranularity(axis=5))(x)
    with pytest.raises(IndexError, match="empty"):
        make()(torch.empty(0, 4))
    with pytest.raises(TypeError, match=r"must be floating point.*torch\.int32"):
        make()(torch.ones(2, 2, dtype=torch.int32))


@pytest.mark.parametrize(("dtype", "bounds"), [("int4", (-200, 7)), ("uint8", (-3, 255)), ("int8", (9, -9))])
def test_a_range_that_the_dtype_has_not_is_refused(make_activation, x, dtype, bounds):
    module = make_activation(dtype=dtype)
    expected = module(x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parts = (module, module.qparams_calculator)
    given = parts[0].quant_min, parts[0].quant_max
    for each in parts:
        each.quant_min, each.quant_max = bounds
    for part in parts:
        with pytest.raises(
            ValueError, match=rf"quant_min and quant_max of torch.{dtype} must be from .* got {bounds[0]} and"
        ):
            part(2 * x)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    for each in parts:
        each.quant_min, each.quant_max = given
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("calculator", ["moving_average", "global_minmax", "static"])
def test_another_grid_of_blocks_is_refused(make_activation, x, calculator):
    module = make_activation(granularity=PerChannelGranularity(axis=0), qparam_calculator_cls=calculator)
    module(x)
    with pytest.raises(RuntimeError, match=r"blocks of shape \(5, 1\)"):
        module(torch.randn(5, 8))
    module.disable_observer()
    with pytest.raises(RuntimeError, match=r"\(5, 1\)"):
        module(torch.randn(5, 8))


@pytest.mark.parametrize(
    "granularity", [PerChannelGranularity(axis=1), PerBlockGranularity(axis=1, block_size=4)]
)
def test_an_empty_batch_passes_frozen_parameters(make_activation, x, granularity):
    module = make_activation(granularity=granularity, qparam_calculator_cls="moving_average")
    module(x)
    module.disable_observer()
    for _ in range(3):
        assert module(torch.empty(0, 8)).shape == (0, 8)
    assert torch.equal(module(x), make_activation(granularity=granularity)(x))


@pytest.mark.parametrize("calculator", ["moving_average", "global_minmax", "static"])
@pytest.mark.parametrize("qscheme", ["symmetric", "asymmetric"])
def test_the_memory_format_of_the_module_is_no_matter(make_activation, calculator, qscheme):
    def run(memory_format):
        images = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        module = make_activation(
            granularity=PerBlockGranularity(axis=1, block_size=4),
            qparam_calculator_cls=calculator,
            qscheme=qscheme,
        )
        outputs = [module(images)]
        module.to(memory_format=memory_format)
        assert module.qparams_calculator.scale.is_contiguous(memory_format=memory_format)
        outputs += [module(images * factor) for factor in (2, 3, 4)]
        module.disable_observer()
        outputs += [module(images) for _ in range(3)]
        return [*outputs, *module.state_dict().values()]

    assert all(map(torch.equal, run(torch.channels_last), run(torch.contiguous_format)))


def test_properties_belong_to_the_calculator(make_activation):
    module = make_activation(qscheme="asymmetric")
    assert module.qscheme is QuantizationScheme.ASYMMETRIC
    assert module.quantization_target is CompressionTargetTensor.ACTIVATION
    assert module.get_block_size(torch.Size((4, 8))) == (4, 8)
    for name in ("qscheme", "quantization_target"):
        with pytest.raises(AttributeError):
            setattr(module, name, None)


@pytest.mark.parametrize("forwards", [1, 4])  # on the slow path, and captured
def test_assigned_settings_take_effect(make_activation, x, forwards):
    module = make_activation()
    for _ in range(forwards):
        module(x)
    module.qparams_calculator.averaging_constant = 1.0
    module(4 * x)
    assert module.qparams_calculator.running_max.item() == (4 * x).amax().item()
    module.quant_min, module.quant_max = -2, 1
    assert module(x).unique().numel() <= 4


def test_constructor_forms(make, x):
    made = make()
    calculator, cls = made.qparams_calculator, type(made)
    fields = (PerTensorGranularity(), torch.int8, -128, 127, calculator)
    symmetric, zp, weight = (
        QuantizationScheme.SYMMETRIC,
        QuantizationFormulation.ZP,
        CompressionTargetTensor.WEIGHT,
    )
    names = ("granularity", "target_dtype", "quant_min", "quant_max", "qparams_calculator")
    keywords = dict(zip(names, fields, strict=True))
    modules = [
        cls(torch.int8, zp, *fields, 8),
        cls(torch.int8, symmetric, zp, *fields, weight, 8),
        cls(torch.int8, symmetric, zp, *fields, quantization_target=weight, n_bits=8),
        cls(torch.int8, symmetric, qformulation=zp, **keywords, quantization_target=weight, n_bits=8),
        cls(dtype=torch.int8, qscheme=symmetric, qformulation=zp, **keywords, n_bits=8),
        cls.with_args(dtype=torch.int8, qformulation=zp, **keywords, n_bits=8)(),
    ]
    for module in modules:
        assert module.qformulation is zp
        assert module.n_bits == 8
        assert module.qparams_calculator is calculator
        assert torch.equal(module(x), made(x))


def test_a_constructor_argument_that_contradicts_the_calculator_warns(make):
    made = make()
    with pytest.warns(UserWarning, match="qscheme=asymmetric is not used"):
        module = type(made)(
            torch.int8,
            QuantizationScheme.ASYMMETRIC,
            QuantizationFormulation.ZP,
            PerTensorGranularity(),
            torch.int8,
            -128,
            127,
            made.qparams_calculator,
            CompressionTargetTensor.WEIGHT,
        )
    assert module.qscheme is QuantizationScheme.SYMMETRIC


def test_fp4_forward():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.1, 0.25, 0.3, 0.75, 1.25, 2.5, 5, 7, -0.0, -3.5, inf, nan])
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 4.0, 6.0, -0.0, -4.0, 6.0, nan])
    y = fp4_forward(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[:-1], expected.signbit()[:-1])
    assert fp4_forward(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="floating point"):
        fp4_forward(torch.arange(4))
