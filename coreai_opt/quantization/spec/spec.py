"""The specification of a tensor's quantization."""

import difflib
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    computed_field,
    field_validator,
    model_validator,
)

from coreai_opt.common import CompressionType
from coreai_opt.config.spec.base import CompressionSpec
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.granularity import (
    PerChannelGranularity,
    PerTensorGranularity,
    QuantizationGranularity,
)
from coreai_opt.quantization.spec.qformulation import QuantizationFormulation
from coreai_opt.quantization.spec.qparams_calculator import (
    QParamsCalculatorBase,
    StatelessQParamsCalculatorBase,
)
from coreai_opt.quantization.spec.qscheme import QuantizationScheme
from coreai_opt.quantization.spec.range_calculator import RangeCalculatorBase

__all__ = ["QuantizationSpec", "default_activation_quantization_spec", "default_weight_quantization_spec"]


class QuantizationSpec(CompressionSpec):
    """How to quantize one tensor. Immutable.

    Fields:
        dtype: dtype of the quantized values, also by name, e.g. ``"int4"``, ``"float8_e4m3fn"``,
            ``"float4_e2m1fn"``. int3, int5 and int7 are extensions of this package.
        qscheme: how the quantized values lie around zero. Floating-point dtypes are symmetric, and so is
            int8 with power-of-two scales.
        qformulation: zero point or minimum; the former where only symmetric values are possible.
        granularity: which elements share parameters; also a dict ``{"type": "per_block", "axis": 1, ...}``.
        fake_quantize_cls, qparam_calculator_cls, range_calculator_cls: registered classes, also by key.
        float_range: fixed ends of the range, ``[minimum <= 0, maximum >= 0]``, None for an end to observe.
        scale_dtype: ``float8_e8m0fnu`` for power-of-two scales, which 4-bit floating point always has, and
            int8 and 8-bit floating point may have (MXINT8, MXFP8).

    A subclass adds fields to pass more arguments to the classes: each is handed to all three of them.

    Raises:
        pydantic.ValidationError: a value is not allowed, or two exclude each other.
        KeyError: the ``type`` of a granularity is not registered.
    """

    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = set(_numbers.SUPPORTED_DTYPES)
    _DTYPE_ALIASES: ClassVar[dict[str, torch.dtype]] = {
        "float4_e2m1fn": torch.float4_e2m1fn_x2,
        "float8_e4m3": torch.float8_e4m3fn,
        "float8_e8m0": torch.float8_e8m0fnu,
    }
    _compression_type: CompressionType = PrivateAttr(default=CompressionType.QUANTIZATION)

    dtype: torch.dtype = torch.int8
    qscheme: QuantizationScheme = QuantizationScheme.SYMMETRIC
    qformulation: QuantizationFormulation = QuantizationFormulation.ZP
    granularity: Annotated[
        QuantizationGranularity, BeforeValidator(QuantizationGranularity.maybe_build_from_dict)
    ] = Field(default_factory=PerTensorGranularity)
    # The defaults are keys, which validation replaces by the classes.
    fake_quantize_cls: type[FakeQuantizeImplBase] = Field(default="default", validate_default=True)
    qparam_calculator_cls: type[QParamsCalculatorBase] = Field(default="default", validate_default=True)
    range_calculator_cls: type[RangeCalculatorBase] = Field(default="minmax", validate_default=True)
    float_range: list[float | int | None] = Field(default_factory=lambda: [None, None])  # type: ignore[arg-type]
    scale_dtype: torch.dtype | None = None

    @classmethod
    def _resolve_str_dtype(cls, name: str) -> torch.dtype:
        """The dtype called ``name``; ValueError if there is none."""
        dtype = cls._DTYPE_ALIASES.get(name) or getattr(torch, name, None)
        if isinstance(dtype, torch.dtype):
            return dtype
        known = [*cls._DTYPE_ALIASES, *(str(dtype).removeprefix("torch.") for dtype in cls.SUPPORTED_DTYPES)]
        near = difflib.get_close_matches(name.strip().lower().removeprefix("torch."), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unsupported dtype: {name!r}.{hint} Allowed dtypes: {cls._allowed_dtypes()}")

    @classmethod
    def _allowed_dtypes(cls) -> str:
        return ", ".join(sorted(map(str, cls.SUPPORTED_DTYPES)))

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_other_range(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """ValueError if what follows from dtype and qscheme is given with another value."""
        spec = handler(data)
        for field in ("n_bits", "quant_min", "quant_max") if isinstance(data, dict) else ():
            if field in data and data[field] != getattr(spec, field):
                raise ValueError(
                    f"{field} follows from the dtype and the qscheme, and is {getattr(spec, field)} for "
                    f"dtype={spec.dtype} and qscheme='{spec.qscheme}'; got {field}={data[field]!r}. Choose "
                    f"another dtype, such as 'int4', or qscheme, such as 'symmetric_with_clipping'"
                )
        return spec

    # A dump holds the computed fields too; loading it must give the same specification.
    @model_validator(mode="before")
    @classmethod
    def _strip_computed_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.model_computed_fields}

    # pydantic runs validators of mode "before" from the last to the first, so this one comes first.
    @model_validator(mode="before")
    @classmethod
    def resolve_scale_dtype(cls, data: Any) -> Any:
        """Replace names of dtypes, and complete the scale's dtype where only one is possible."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for field in ("dtype", "scale_dtype"):
            if isinstance(data.get(field), str):
                data[field] = cls._resolve_str_dtype(data[field])
        if data.get("dtype") == _numbers.FLOAT4 and data.get("scale_dtype") is None:
            data["scale_dtype"] = torch.float8_e8m0fnu
        return data

    @field_validator("dtype", mode="before")
    @classmethod
    def convert_dtype(cls, data: Any) -> Any:
        """The dtype that a name stands for; other values as they are."""
        return cls._resolve_str_dtype(data) if isinstance(data, str) else data

    @field_validator("dtype")
    @classmethod
    def validate_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """ValueError unless ``dtype`` can be quantized to."""
        if dtype not in cls.SUPPORTED_DTYPES:
            raise ValueError(f"Unsupported dtype: {dtype}. Allowed dtypes: {cls._allowed_dtypes()}")
        return dtype

    @field_validator("range_calculator_cls", mode="before")
    @classmethod
    def convert_range_calculator(cls, data: Any) -> Any:
        """The range calculator's class, from itself or its key."""
        return RangeCalculatorBase.resolve(data)

    @field_validator("qparam_calculator_cls", mode="before")
    @classmethod
    def convert_qparam_calculator(cls, data: Any) -> Any:
        """The parameter calculator's class, from itself or its key."""
        return QParamsCalculatorBase.resolve(data)

    @field_validator("fake_quantize_cls", mode="before")
    @classmethod
    def convert_fake_quantize(cls, data: Any) -> Any:
        """The fake quantizer's class, from itself or its key."""
        return FakeQuantizeImplBase.resolve(data)

    @field_validator("float_range", mode="before")
    @classmethod
    def validate_float_range(cls, data: Any) -> list[float | None]:
        """ValueError unless ``data`` is a pair of numbers around zero, or None for an end to observe."""
        if not isinstance(data, list | tuple):
            raise ValueError(f"float_range must be a list or tuple of two bounds; got {data!r}")
        if len(data) != 2:
            raise ValueError(f"float_range must hold two bounds, lower and upper; got {len(data)}: {data!r}")
        for end in data:
            if isinstance(end, bool) or not (end is None or isinstance(end, float | int)):
                raise ValueError(
                    f"each bound of float_range must be a number, or None to observe it; got {end!r}"
                )
        low, high = data
        if low is not None and high is not None and low >= high:
            raise ValueError(f"the lower bound of float_range must be below the upper one; got {data!r}")
        if low is not None and low > 0:
            raise ValueError(f"float_range must contain 0: its lower bound is {low}")
        if high is not None and high < 0:
            raise ValueError(f"float_range must contain 0: its upper bound is {high}")
        return [None if end is None else float(end) for end in data]

    # Validators of mode "after" run in the order of their definition, and the first that raises is reported.
    @model_validator(mode="after")
    def validate_scale_dtype(self) -> "QuantizationSpec":
        """ValueError unless the scale's dtype suits ``dtype``."""
        if self.scale_dtype is None:
            return self
        allowed = _numbers.SCALE_DTYPES.get(self.scale_dtype)
        if allowed is None:
            names = " or ".join(map(str, _numbers.SCALE_DTYPES))
            raise ValueError(f"scale_dtype must be None or {names}; got {self.scale_dtype}")
        if self.dtype not in allowed:
            raise ValueError(
                f"scale_dtype={self.scale_dtype} is for the dtypes {list(allowed)}; got dtype={self.dtype}"
            )
        return self

    @property
    def _is_symmetric_only(self) -> bool:
        return _numbers.is_float_format(self.dtype) or self.scale_dtype is not None

    @model_validator(mode="after")
    def validate_symmetric_qscheme(self) -> "QuantizationSpec":
        """ValueError unless floating-point values, and those with a scale dtype, are symmetric."""
        if self._is_symmetric_only and self.qscheme != QuantizationScheme.SYMMETRIC:
            raise ValueError(
                f"qscheme must be 'symmetric' for dtype={self.dtype} with scale_dtype={self.scale_dtype}; "
                f"got '{self.qscheme}'"
            )
        return self

    @model_validator(mode="after")
    def validate_zp_qformulation(self) -> "QuantizationSpec":
        """ValueError unless floating-point values, and those with a scale dtype, use the zero point."""
        if self._is_symmetric_only and self.qformulation != QuantizationFormulation.ZP:
            raise ValueError(
                f"qformulation must be 'zp' for dtype={self.dtype} with scale_dtype={self.scale_dtype}; "
                f"got '{self.qformulation}'"
            )
        return self

    @model_validator(mode="after")
    def validate_qscheme_for_dynamic_quant(self) -> "QuantizationSpec":
        """ValueError if a dynamic calculator shall clip."""
        stateless = issubclass(self.qparam_calculator_cls, StatelessQParamsCalculatorBase)
        if stateless and self.qscheme == QuantizationScheme.SYMMETRIC_WITH_CLIPPING:
            raise ValueError(
                f"qscheme must be 'symmetric' or 'asymmetric' with the dynamic calculator "
                f"{self.qparam_calculator_cls.__name__}; got '{self.qscheme}'"
            )
        return self

    def get_extra_args(self) -> dict[str, Any]:
        """The fields that a subclass adds."""
        own = QuantizationSpec.model_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name not in own}

    @classmethod
    def get_n_bits_from_dtype(cls, dtype: torch.dtype | str) -> int:
        """Bits of one value; RuntimeError if the dtype's name does not say."""
        return _numbers.bits_of(dtype)  # type: ignore[arg-type]

    @classmethod
    def get_target_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """The dtype that holds one quantized value: 8-bit integers for narrower ones, e4m3 for e2m1."""
        return _numbers.storage_dtype_of(dtype)

    @classmethod
    def get_quant_range(
        cls, dtype: torch.dtype, qscheme: QuantizationScheme
    ) -> tuple[int | float, int | float]:
        """The smallest and the largest quantized value."""
        return _numbers.range_of(dtype, qscheme == QuantizationScheme.SYMMETRIC_WITH_CLIPPING)

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @cached_property
    def n_bits(self) -> int:
        """Bits of one quantized value."""
        return self.get_n_bits_from_dtype(self.dtype)

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @cached_property
    def target_dtype(self) -> torch.dtype:
        """The dtype that holds one quantized value."""
        return self.get_target_dtype(self.dtype)

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @cached_property
    def _quant_range(self) -> tuple[int | float, int | float]:
        return self.get_quant_range(self.dtype, self.qscheme)

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @cached_property
    def quant_min(self) -> int | float:
        """The smallest quantized value."""
        return self._quant_range[0]

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @cached_property
    def quant_max(self) -> int | float:
        """The largest quantized value."""
        return self._quant_range[1]


def default_weight_quantization_spec() -> QuantizationSpec:
    """8-bit integers, symmetric, per output channel (axis 0)."""
    return QuantizationSpec(
        # By their keys: a plugin may have registered other classes.
        granularity=PerChannelGranularity(axis=0),
        qparam_calculator_cls="static",  # type: ignore[arg-type]
    )


def default_activation_quantization_spec() -> QuantizationSpec:
    """8-bit integers, symmetric, per tensor, from a moving average of the ranges."""
    return QuantizationSpec(qparam_calculator_cls="moving_average")  # type: ignore[arg-type]
