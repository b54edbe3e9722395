"""Users' own quantizers, calculators and range calculators, registered under a key and named in a spec."""

import functools
from unittest import mock

import pytest
import torch

from coreai_opt.quantization.spec import (
    MinMaxRangeCalculator,
    MovingAverageQParamsCalculator,
    QParamsCalculatorBase,
    RangeCalculatorBase,
    RunningRangeMixin,
    StatefulQParamsCalculatorBase,
    StatelessQParamsCalculatorBase,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

DEFAULT = FakeQuantizeImplBase.get_class("default")


@pytest.fixture
def rounding(registration):
    """A fake quantizer that implements just quantize and dequantize; the list tells of its calls."""
    calls = []

    @registration(FakeQuantizeImplBase, "rounding")
    class Rounding(FakeQuantizeImplBase):
        def quantize(self, tensor, scale, zero_point, minval, cast_to_target_dtype=True):
            calls.append(("quantize", tensor.dtype, scale.shape, cast_to_target_dtype))
            return (tensor / scale).clamp(-1.5, 1.5)

        def dequantize(self, tensor, scale, zero_point, minval, output_dtype=torch.float32):
            calls.append(("dequantize", tensor.dtype))
            return tensor * scale * 2

    return calls


def test_quantize_and_dequantize_are_the_simulation(make, x, rounding):
    module = make(fake_quantize_cls="rounding")
    x.requires_grad_()
    y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert rounding == [("quantize", torch.float32, (1, 1), False), ("dequantize", torch.float32)]
    y.float().sum().backward()
    scale, *_ = module.calculate_qparams()
    expected = 2.0 * ((x.bfloat16().float() / scale).abs() <= 1.5)
    assert torch.equal(x.grad, expected.detach())


def test_they_are_with_observation_off_too(make, x, rounding):
    module = make(fake_quantize_cls="rounding")
    module(x)
    module.disable_observer()
    rounding.clear()
    module(x)
    assert [call[0] for call in rounding] == ["quantize", "dequantize"]


@pytest.mark.parametrize("on", ["class", "instance"])
@pytest.mark.parametrize("method", ["quantize", "dequantize", "get_block_size", "_fused_fake_quant_dequant"])
def test_a_method_that_hands_on_to_the_default_keeps_values_and_gradient(make, x, registration, method, on):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(method)
        return getattr(DEFAULT, method)(self, *args, **kwargs)

    if on == "class":
        registration(FakeQuantizeImplBase, "mine")(type("Mine", (DEFAULT,), {method: override}))
        module = make(fake_quantize_cls="mine")
    else:
        module = make()
        module(x)
        setattr(module, method, functools.partial(override, module))
    default = make()
    for observes in (True, True, False, False):
        for each in (module, default):
            each.enable_observer(observes)
        given, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.equal(module(given), default(expected))
        (gradient,) = torch.autograd.grad(module(given).square().sum(), given)
        (wanted,) = torch.autograd.grad(default(expected).square().sum(), expected)
        assert wanted.any()
        assert torch.equal(gradient, wanted)
    # Training goes through one kernel, as Apple's does: it calls neither quantize nor dequantize.
    assert bool(calls) == (method in ("get_block_size", "_fused_fake_quant_dequant"))


def test_blocks_of_a_subclass(make, x, registration):
    @registration(FakeQuantizeImplBase, "rows")
    class Rows(DEFAULT):
        def get_block_size(self, tensor_shape):
            return 1, tensor_shape[1]

    module = make(fake_quantize_cls="rows")
    scale = torch.rand(len(x), 1) + 0.1
    zero_point = torch.ones_like(scale, dtype=torch.int32)
    output = module._fused_fake_quant_dequant(x, scale, zero_point, torch.zeros_like(scale))
    rows = [
        make()._fused_fake_quant_dequant(row[None], size[None], zero_point[:1], torch.zeros(1, 1))
        for row, size in zip(x, scale, strict=True)
    ]
    assert torch.equal(output, torch.cat(rows))


def test_a_method_replaced_on_the_instance(make, x):
    module = make()
    module(x)
    module._fused_fake_quant_dequant = lambda tensor, *args: torch.zeros_like(tensor)
    assert not module(x).any()


@pytest.mark.parametrize("part", ["qparams_calculator", "qparams_calculator.range_calculator"])
def test_hooks_on_the_parts_are_called(make, x, part):
    module, seen = make(), []
    y = module(x)
    handle = module.get_submodule(part).register_forward_hook(lambda *args: seen.append(args[1][0].shape))
    assert torch.equal(module(x), y)
    handle.remove()
    module(x)
    assert seen == [x.shape]


def test_the_simulation_overridden_as_a_whole(make, x, registration):
    @registration(FakeQuantizeImplBase, "whole")
    class Whole(DEFAULT):
        def _fused_fake_quant_dequant(self, tensor, scale, zero_point, minval):
            return tensor + scale

    module = make(fake_quantize_cls="whole")
    assert torch.equal(module(x), x + module.calculate_qparams()[0])


def test_both_methods_are_needed(make, registration):
    class Half(FakeQuantizeImplBase):
        def quantize(self, *args, **kwargs):
            return args[0]

    with pytest.raises(TypeError, match=r"abstract.*dequantize"):
        Half()


def test_range_calculator(make, x, registration):
    @registration(RangeCalculatorBase, "fixed")
    class Fixed(RangeCalculatorBase):
        def _generate_min_max(self, tensor):
            return torch.tensor(-0.5), torch.tensor(0.25)

    module = make(range_calculator_cls="fixed")
    assert module(x).amax() <= 0.5
    assert module.calculate_qparams()[0].item() == pytest.approx(0.5 / 127.5)


def test_range_calculator_by_inheritance(make, x, registration):
    base = RangeCalculatorBase.get_class("minmax")

    @registration(RangeCalculatorBase, "narrow")
    class Narrow(base):
        def _generate_min_max(self, tensor):
            low, high = super()._generate_min_max(tensor)
            return low / 2, high / 2

    module = make(range_calculator_cls="narrow")
    module(x)
    assert module.calculate_qparams()[2].item() == -x.abs().amax().item() / 2


def test_running_range(make_activation, x, registration):
    seen = []

    @registration(QParamsCalculatorBase, "sum")
    class Sum(RunningRangeMixin, StatefulQParamsCalculatorBase):
        def update_running_range(self, min_val, max_val):
            seen.append(min_val.shape)
            return min_val + self.running_min, max_val + self.running_max

    module = make_activation(qparam_calculator_cls="sum")
    for _ in range(3):
        module(x)
    assert seen == [(1, 1)] * 2
    assert module.qparams_calculator.running_max.item() == pytest.approx(3 * x.amax().item())
    assert set(module.qparams_calculator.state_dict()) == {
        "scale",
        "zero_point",
        "minval",
        "running_min",
        "running_max",
    }


def test_compute_qparams(make_activation, x, registration):
    @registration(QParamsCalculatorBase, "double")
    class Double(StatefulQParamsCalculatorBase):
        def compute_qparams(self, tensor, min_val, max_val):
            scale, zero_point, minval = super().compute_qparams(tensor, min_val, max_val)
            return 2 * scale, zero_point, minval

    module = make_activation(qparam_calculator_cls="double")
    module(x)
    assert module.calculate_qparams()[0].item() == pytest.approx(2 * x.abs().amax().item() / 127.5)


def test_stateless(make, x, registration):
    @registration(QParamsCalculatorBase, "stateless")
    class Stateless(StatelessQParamsCalculatorBase):
        pass

    module = make(qparam_calculator_cls="stateless")
    assert module.is_stateless
    assert torch.equal(module(x), make()(x))


def test_forward_alone(make_activation, x, registration):
    @registration(QParamsCalculatorBase, "constant")
    class Constant(QParamsCalculatorBase):
        def forward(self, tensor):
            return torch.full((1, 1), 0.5), torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), -64.0)

    module = make_activation(qparam_calculator_cls="constant")
    assert torch.equal(module(x), (x / 0.5).round() * 0.5 + 0.0)
    assert not module.is_stateless


def test_an_unregistered_subclass_is_refused(make_activation):
    class Mine(StatefulQParamsCalculatorBase):
        pass

    with pytest.raises(ValueError, match=r"Mine is not among the classes.*Register it first"):
        make_activation(qparam_calculator_cls=Mine)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (MinMaxRangeCalculator, "_generate_min_max"),
        (RangeCalculatorBase, "forward"),
        (QParamsCalculatorBase, "compute_qparams"),
        (StatefulQParamsCalculatorBase, "forward"),
        (MovingAverageQParamsCalculator, "update_running_range"),
        (FakeQuantizeImplBase, "get_block_size"),
        (DEFAULT, "_fused_fake_quant_dequant"),
    ],
)
def test_a_method_patched_on_a_built_in_class_is_called(make_activation, x, cls, name, when):
    module, expected = make_activation(), make_activation()
    outputs = [expected(x) for _ in range(5)]
    if when == "after":
        for _ in range(3):
            module(x)
    with mock.patch.object(cls, name, autospec=True, side_effect=getattr(cls, name)) as patched:
        found = [module(x) for _ in range(2)]
    assert patched.called
    assert torch.equal(found[-1], outputs[4 if when == "after" else 1])
    called = patched.call_count
    module(x)
    assert patched.call_count == called
