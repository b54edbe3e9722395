import pickle

import pytest
import torch

from coreai_opt._utils.spec_utils import PartialConstructor
from coreai_opt.config.spec import CompressionComponentFactoryBase, CompressionTargetTensor
from coreai_opt.quantization.spec import (
    DynamicQParamsCalculator,
    MinMaxRangeCalculator,
    MovingAverageQParamsCalculator,
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
    StaticQParamsCalculator,
)

WEIGHT, ACTIVATION = CompressionTargetTensor.WEIGHT, CompressionTargetTensor.ACTIVATION
Factory = QuantizationComponentFactory


def test_no_spec_no_quantizer():
    assert Factory.construct(None, WEIGHT) is None
    assert Factory.construct_partial(None, WEIGHT) is None


@pytest.mark.parametrize(
    ("target", "calculator"),
    [
        (WEIGHT, StaticQParamsCalculator),
        (ACTIVATION, MovingAverageQParamsCalculator),
        (CompressionTargetTensor.LUT, StaticQParamsCalculator),
    ],
)
def test_the_default_calculator_follows_the_target(target, calculator):
    module = Factory.construct(QuantizationSpec(), target)
    assert type(module.qparams_calculator) is calculator
    assert module.quantization_target is target
    assert module.qparams_calculator.range_calculator.quantization_target is target


@pytest.mark.parametrize("target", ["weight", None])
def test_unknown_targets(target):
    with pytest.raises(ValueError, match="quantization_target must be"):
        Factory.construct(QuantizationSpec(), target)


def test_dynamic_is_for_activations_without_a_fixed_range():
    with pytest.raises(ValueError, match="is for activations"):
        Factory.construct(QuantizationSpec(qparam_calculator_cls="dynamic"), WEIGHT)
    with pytest.raises(ValueError, match=r"requires float_range=\[None, None\]"):
        Factory.construct(QuantizationSpec(qparam_calculator_cls="dynamic", float_range=[-1, 1]), ACTIVATION)
    made = Factory.create_qparams_calculator(QuantizationSpec(qparam_calculator_cls="dynamic"), ACTIVATION)
    assert type(made) is DynamicQParamsCalculator


def test_parts():
    spec = QuantizationSpec(dtype="int4", granularity=PerChannelGranularity(axis=1))
    assert type(Factory.create_range_calculator(spec)) is MinMaxRangeCalculator
    module = Factory.create_fake_quantizer(spec, WEIGHT)
    calculator = module.qparams_calculator
    for part in (module, calculator, calculator.range_calculator):
        assert part.granularity == spec.granularity
    for part in (module, calculator):
        assert (part.dtype, part.quant_min, part.quant_max) == (torch.int4, -8, 7)
    assert module.n_bits == 4
    assert module.qscheme == spec.qscheme


def test_partial_constructors_make_independent_quantizers(x):
    waiting = Factory.construct_partial(QuantizationSpec(dtype="int4"), ACTIVATION)
    assert isinstance(waiting, PartialConstructor)
    first, second = waiting(), waiting()
    assert first.qparams_calculator is not second.qparams_calculator
    assert type(first.qparams_calculator) is MovingAverageQParamsCalculator
    first(x)
    assert second.qparams_calculator.scale.numel() == 0
    assert torch.equal(pickle.loads(pickle.dumps(waiting))()(x), second(x))


def test_partial_constructors_take_more_arguments():
    waiting = Factory.create_fake_quantizer_partial(QuantizationSpec(), WEIGHT)
    more = waiting.with_args(n_bits=3)
    assert isinstance(more, PartialConstructor)
    assert more().n_bits == 3
    assert waiting().n_bits == 8
    assert waiting(quant_min=-4).quant_min == -4


def test_attributes_of_the_calculator_can_be_set_beforehand(x):
    waiting = Factory.construct_partial(QuantizationSpec(), WEIGHT)
    granularity = PerChannelGranularity(axis=0)
    changed = Factory.reconstruct_partial_qparams_calculator(
        waiting, granularity=granularity, float_range=[-1.0, 1.0]
    )
    module = changed()
    assert module.qparams_calculator.granularity == granularity
    assert module.qparams_calculator.range_calculator.granularity == granularity
    assert module.qparams_calculator.float_range == [-1.0, 1.0]
    module(x)
    assert module.calculate_qparams()[0].shape == (4, 1)
    assert waiting().qparams_calculator.granularity == PerTensorGranularity()


def test_attributes_that_the_calculator_lacks():
    waiting = Factory.construct_partial(QuantizationSpec(), WEIGHT)
    changed = Factory.reconstruct_partial_qparams_calculator(waiting, averaging_constant=0.5)
    with pytest.raises(
        AttributeError, match=r"StaticQParamsCalculator has no attribute 'averaging_constant'"
    ):
        changed()


def test_the_base_factory_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        CompressionComponentFactoryBase()
