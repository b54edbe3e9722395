"""From a quantization specification to the modules that carry it out."""

from functools import partial
from typing import Any

from coreai_opt._utils.spec_utils import PartialConstructor
from coreai_opt.config.spec.factory import CompressionComponentFactoryBase, CompressionTargetTensor
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.qparams_calculator import (
    DynamicQParamsCalculator,
    MovingAverageQParamsCalculator,
    QParamsCalculatorBase,
    StaticQParamsCalculator,
    _DefaultQParamsCalculator,
)
from coreai_opt.quantization.spec.range_calculator import RangeCalculatorBase
from coreai_opt.quantization.spec.spec import QuantizationSpec

__all__ = ["QuantizationComponentFactory"]


class QuantizationComponentFactory(CompressionComponentFactoryBase):
    """Builds fake quantizers and their parts."""

    @classmethod
    def construct(  # type: ignore[override]
        cls, spec: QuantizationSpec | None, target: CompressionTargetTensor
    ) -> FakeQuantizeImplBase | None:
        """The fake quantizer for a tensor of role ``target``; None for no quantization.

        Raises:
            ValueError: ``target`` is no role, or the calculator does not serve it.
        """
        return None if spec is None else cls.create_fake_quantizer(spec, target)

    @classmethod
    def construct_partial(  # type: ignore[override]
        cls, spec: QuantizationSpec | None, target: CompressionTargetTensor
    ) -> PartialConstructor[FakeQuantizeImplBase] | None:
        """A constructor of such fake quantizers, which share nothing; None for no quantization."""
        return None if spec is None else cls.create_fake_quantizer_partial(spec, target)

    @classmethod
    def create_range_calculator(
        cls,
        spec: QuantizationSpec,
        quantization_target: CompressionTargetTensor = CompressionTargetTensor.WEIGHT,
    ) -> RangeCalculatorBase:
        """The specification's range calculator."""
        result = spec.range_calculator_cls(
            granularity=spec.granularity, quantization_target=quantization_target, **spec.get_extra_args()
        )
        result.set_spec(spec)
        return result

    @classmethod
    def create_qparams_calculator(
        cls, spec: QuantizationSpec, quantization_target: CompressionTargetTensor
    ) -> QParamsCalculatorBase:
        """The specification's parameter calculator, with its range calculator.

        The calculator ``"default"`` is a moving average for activations, and static otherwise.

        Raises:
            ValueError: ``quantization_target`` is no role, or the calculator does not serve it.
        """
        if not isinstance(quantization_target, CompressionTargetTensor):
            raise ValueError(
                f"quantization_target must be a CompressionTargetTensor; got {quantization_target!r}"
            )
        is_activation = quantization_target == CompressionTargetTensor.ACTIVATION
        calculator: Any = spec.qparam_calculator_cls
        if calculator is _DefaultQParamsCalculator:
            calculator = MovingAverageQParamsCalculator if is_activation else StaticQParamsCalculator
        if calculator is DynamicQParamsCalculator and not is_activation:
            raise ValueError(
                f"DynamicQParamsCalculator is for activations, whose range each input has anew; "
                f"got quantization_target={quantization_target}"
            )
        result: QParamsCalculatorBase = calculator(
            dtype=spec.dtype,
            qscheme=spec.qscheme,
            granularity=spec.granularity,
            target_dtype=spec.target_dtype,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            range_calculator=cls.create_range_calculator(spec, quantization_target),
            float_range=spec.float_range,
            scale_dtype=spec.scale_dtype,
            **spec.get_extra_args(),
        )
        return result

    @classmethod
    def create_fake_quantizer(
        cls, spec: QuantizationSpec, quantization_target: CompressionTargetTensor
    ) -> FakeQuantizeImplBase:
        """The specification's fake quantizer, with its parts.

        Raises:
            ValueError: ``quantization_target`` is no role, or the calculator does not serve it.
        """
        return spec.fake_quantize_cls(
            **cls._arguments(spec),
            qparams_calculator=cls.create_qparams_calculator(spec, quantization_target),
        )

    @classmethod
    def create_fake_quantizer_partial(
        cls, spec: QuantizationSpec, quantization_target: CompressionTargetTensor
    ) -> PartialConstructor[FakeQuantizeImplBase]:
        """A constructor of such fake quantizers; each gets a calculator of its own."""
        calculator = partial(cls.create_qparams_calculator, spec, quantization_target)
        waiting = spec.fake_quantize_cls.with_args(**cls._arguments(spec))
        return waiting.with_callable_args(qparams_calculator=calculator)

    @classmethod
    def reconstruct_partial_qparams_calculator(
        cls, partial_ctr: PartialConstructor[Any], **kwargs: Any
    ) -> PartialConstructor[Any]:
        """``partial_ctr`` with attributes of the calculators that it makes set to ``kwargs``.

        A new granularity is passed to the fake quantizer as well. A constructor that makes no calculator is
        returned as it is.

        Raises:
            AttributeError: at construction, if the calculator has no such attribute.
        """
        make = partial_ctr.callable_args.get("qparams_calculator")
        if make is None:
            return partial_ctr
        own = {"granularity": kwargs["granularity"]} if "granularity" in kwargs else {}
        return partial_ctr.with_args(**own).with_callable_args(
            qparams_calculator=partial(_make_with_attributes, make, kwargs)
        )

    @classmethod
    def _arguments(cls, spec: QuantizationSpec) -> dict[str, Any]:
        return {
            "dtype": spec.dtype,
            "qformulation": spec.qformulation,
            "granularity": spec.granularity,
            "target_dtype": spec.target_dtype,
            "quant_min": spec.quant_min,
            "quant_max": spec.quant_max,
            "n_bits": spec.n_bits,
            **spec.get_extra_args(),
        }


def _make_with_attributes(make: Any, attributes: dict[str, Any]) -> QParamsCalculatorBase:
    calculator: QParamsCalculatorBase = make()
    for name, value in attributes.items():
        if not hasattr(calculator, name):
            raise AttributeError(f"{type(calculator).__name__} has no attribute {name!r} to override")
        setattr(calculator, name, value)
    return calculator
