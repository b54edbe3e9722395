import pytest
import torch

from coreai_opt.quantization.spec import (
    GlobalMinMaxQParamsCalculator,
    MinMaxRangeCalculator,
    MovingAverageQParamsCalculator,
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
    QParamsCalculatorBase,
    QuantizationScheme,
    RangeCalculatorBase,
    StaticQParamsCalculator,
)

FIELDS = {
    "dtype": torch.int8,
    "qscheme": QuantizationScheme.SYMMETRIC,
    "granularity": PerTensorGranularity(),
    "target_dtype": torch.int8,
    "quant_min": -128,
    "quant_max": 127,
    "float_range": [None, None],
}


def calculator(cls=StaticQParamsCalculator, **fields):
    fields = FIELDS | fields
    return cls(**fields, range_calculator=MinMaxRangeCalculator(fields["granularity"]))


def test_range_calculator(x):
    low, high = MinMaxRangeCalculator(PerBlockGranularity(axis=1, block_size=4))(x)
    blocks = x.reshape(4, 2, 4)
    assert torch.equal(low, blocks.amin(2))
    assert torch.equal(high, blocks.amax(2))
    assert MinMaxRangeCalculator(PerTensorGranularity())(x.bfloat16())[0].dtype == torch.bfloat16


def test_range_calculator_errors(x):
    with pytest.raises(ValueError, match=r"not divisible by .*block size 3"):
        MinMaxRangeCalculator(PerBlockGranularity(axis=1, block_size=3))(x)
    with pytest.raises(IndexError, match="empty"):
        MinMaxRangeCalculator(PerTensorGranularity())(torch.empty(0, 4))
    with pytest.raises(TypeError, match="abstract"):
        RangeCalculatorBase(PerTensorGranularity())


def test_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        calculator(QParamsCalculatorBase)


def test_before_the_first_forward():
    made = calculator()
    with pytest.warns(UserWarning, match="no tensor has been observed"):
        scale, zero_point, minval = made.get_qparams()
    assert scale.shape == zero_point.shape == minval.shape == (0,)
    assert (scale.dtype, zero_point.dtype, minval.dtype) == (torch.float32, torch.int32, torch.float32)


def test_floating_point_values_have_a_scale_only(x):
    made = calculator(dtype=torch.float8_e4m3fn, quant_min=-448.0, quant_max=448.0)
    assert set(made.state_dict()) == {"scale"}
    scale, zero_point, minval = made(x)
    assert scale.item() == (x.abs().amax() / 448).item()
    assert zero_point is None
    assert minval is None


def test_static_keeps_the_last(x):
    made = calculator()
    made(2 * x)
    scale, zero_point, minval = made(x)
    assert scale.item() == pytest.approx(x.abs().amax().item() / 127.5)
    assert zero_point.item() == 0
    assert minval.item() == -x.abs().amax().item()
    for kept, returned in zip(made.get_qparams(), (scale, zero_point, minval), strict=True):
        assert torch.equal(kept, returned)


def test_asymmetric(x):
    made = calculator(qscheme=QuantizationScheme.ASYMMETRIC)
    scale, zero_point, minval = made(x)
    assert scale.item() == pytest.approx((x.amax() - x.amin()).item() / 255)
    assert zero_point.item() == -128 - round((x.amin() / scale).item())
    assert minval.item() == x.amin().item()


def test_moving_average(x):
    made = calculator(MovingAverageQParamsCalculator, averaging_constant=0.25)
    made(x)
    assert torch.equal(made.running_max, x.amax().reshape(1, 1))
    made(4 * x)
    assert made.running_max.item() == pytest.approx(x.amax().item() * (0.25 * 4 + 0.75))
    assert made.running_min.item() == pytest.approx(x.amin().item() * (0.25 * 4 + 0.75))


def test_global_minmax(make_activation, x):
    made = make_activation(qparam_calculator_cls="global_minmax").qparams_calculator
    for tensor in (x, 0.1 * x, -x):
        made(tensor)
    assert made.running_max.item() == x.abs().amax().item()
    assert made.running_min.item() == -x.abs().amax().item()


def test_the_running_range_has_the_dtype_observed(make_activation, x):
    made = make_activation().qparams_calculator
    scale, *_ = made(x.bfloat16())
    assert made.running_min.dtype == torch.bfloat16
    assert made.scale.dtype == torch.float32
    assert scale.item() == scale.bfloat16().item()
    made(x)
    assert made.running_min.dtype == torch.bfloat16


def test_compute_qparams_takes_ranges(x):
    made = calculator()
    scale, _, minval = made.compute_qparams(x, torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
    assert scale.item() == pytest.approx(2 / 127.5)
    assert minval.item() == -2
    assert made.scale.shape == (0,)


def test_compute_qparams_of_a_running_range_updates_it(make_activation, x):
    made = make_activation().qparams_calculator
    made.compute_qparams(x, torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
    made.compute_qparams(x, torch.tensor([[-1.0]]), torch.tensor([[4.0]]))
    assert made.running_max.item() == pytest.approx(2.02)


@pytest.mark.parametrize("float_range", [[-1.5, 2.0], [-1.5, None], [None, 2.0]])
def test_fixed_range(make_activation, x, float_range):
    made = make_activation(float_range=float_range, qscheme="asymmetric").qparams_calculator
    made(x)
    for end, kept, seen in zip(
        float_range, (made.running_min, made.running_max), (x.amin(), x.amax()), strict=True
    ):
        assert kept.item() == (seen.item() if end is None else end)


def test_a_fixed_range_is_computed_once(make_activation, x):
    module = make_activation(float_range=[-1.5, 2.0])
    module(x)
    module.qparams_calculator.scale.fill_(0.5)
    module(2 * x)
    assert module.qparams_calculator.scale.item() == 0.5


def test_another_grid_of_blocks_is_refused(make, x):
    made = make(granularity=PerChannelGranularity(axis=0)).qparams_calculator
    made(x)
    with pytest.raises(RuntimeError, match=r"blocks of shape \(5, 1\).*\(4, 1\)"):
        made(torch.randn(5, 8))


@pytest.mark.parametrize("target", ["weight", "activation"])
def test_per_tensor_parameters_serve_all_ranks(make, make_activation, x, target):
    module = make() if target == "weight" else make_activation()
    for tensor in (x, x.reshape(2, 2, 8), x.reshape(-1)):
        assert module(tensor).shape == tensor.shape
    assert module.qparams_calculator.scale.shape == (1, 1)


def test_granularity_is_fixed_by_the_first_forward(make, x):
    module = make()
    module.granularity = PerChannelGranularity(axis=0)
    calculator = module.qparams_calculator
    assert calculator.granularity == calculator.range_calculator.granularity == module.granularity
    module(x)
    assert calculator.scale.shape == (4, 1)
    with pytest.raises(RuntimeError, match="granularity is fixed"):
        module.granularity = PerTensorGranularity()
    assert module.granularity == PerChannelGranularity(axis=0)


def test_export_mode_freezes(make_activation, x):
    module = make_activation()
    module(x)
    frozen = module.qparams_calculator.scale.clone()
    module.set_export_mode()
    assert "export_mode=True" in repr(module)
    module(9 * x)
    assert torch.equal(module.qparams_calculator.scale, frozen)
    module.set_export_mode(False)
    module(9 * x)
    assert not torch.equal(module.qparams_calculator.scale, frozen)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_dynamic_parameters_can_be_looked_at(make_activation, x, dtype):
    module = make_activation(dtype=dtype, qparam_calculator_cls="dynamic", qscheme="symmetric")
    calculator = module.qparams_calculator
    assert not hasattr(calculator, "scale")
    for tensor in (x, 3 * x):
        module(tensor)
        shown = (calculator.scale, calculator.zero_point, calculator.minval)
        for one, other in zip(shown, calculator(tensor), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    assert list(module.state_dict()) == ["fake_quant_enabled", "observer_enabled", "_disabled"]


def test_dynamic(make_activation, x):
    module = make_activation(qparam_calculator_cls="dynamic")
    assert module.is_stateless
    assert list(module.qparams_calculator.state_dict()) == []
    assert module.qparams_calculator(x)[0].item() == pytest.approx(x.abs().amax().item() / 127.5)
    with pytest.raises(NotImplementedError, match="does not support export mode"):
        module.set_export_mode()
    with pytest.raises(AttributeError, match="keeps no parameters"):
        module.calculate_qparams()


@pytest.mark.parametrize(
    "cls", [StaticQParamsCalculator, MovingAverageQParamsCalculator, GlobalMinMaxQParamsCalculator]
)
def test_parameters_have_the_gradient_of_their_range(cls):
    # A maximum that two elements share, a negative one that is larger, zeros alone.
    rows = torch.tensor([[1.0, 2.0, 2.0], [0.5, -4.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    made = calculator(cls, granularity=PerChannelGranularity(axis=0))
    scale, zero_point, minval = made(rows)
    # Symmetric: scale = amax / 127.5, minimum = -amax; a scale at its smallest depends on no element.
    amax = torch.tensor([[0.0, 0.5, 0.5], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(torch.autograd.grad(scale.sum(), rows, retain_graph=True)[0], amax / 127.5)
    assert torch.equal(torch.autograd.grad(minval.sum(), rows)[0], -amax)
    assert not zero_point.requires_grad
    assert not made.scale.requires_grad
    values = calculator(cls, granularity=PerChannelGranularity(axis=0))(rows.detach())
    for got, wanted in zip((scale, zero_point, minval), values, strict=True):
        assert torch.equal(got, wanted)
        assert not wanted.requires_grad


def test_gradient_of_a_moving_average_is_the_share_of_the_new_range():
    made = calculator(MovingAverageQParamsCalculator, averaging_constant=0.25)
    made(torch.tensor([4.0, -1.0]))
    x = torch.tensor([8.0, -1.0], requires_grad=True)
    scale, _, _ = made(x)
    scale.backward()
    assert scale.item() == pytest.approx(5 / 127.5)
    assert x.grad.tolist() == pytest.approx([0.25 / 127.5, 0.0])


def test_gradient_of_a_global_range_reaches_what_extends_it():
    made = calculator(GlobalMinMaxQParamsCalculator)
    made(torch.tensor([4.0, -1.0]))
    for values, share in (([8.0, -1.0], 1.0), ([8.0, -3.0], 0.5), ([2.0, -3.0], 0.0)):
        x = torch.tensor(values, requires_grad=True)
        made(x)[0].backward()
        assert x.grad.tolist() == pytest.approx([share / 127.5, 0.0])
