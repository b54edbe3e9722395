"""From a tensor to its quantization parameters: scale, zero point and minimum of each block."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import coreai_kernels
from coreai_kernels import ScaleFormat
from coreai_opt._utils.registry_utils import ClassRegistryMixin
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec._generation import HasGeneration
from coreai_opt.quantization.spec._state import UNSHAPED, is_shaped, reshape_buffer, same_blocks
from coreai_opt.quantization.spec.granularity import QuantizationGranularity
from coreai_opt.quantization.spec.qscheme import QuantizationScheme
from coreai_opt.quantization.spec.range_calculator import RangeCalculatorBase

__all__ = [
    "DynamicQParamsCalculator",
    "GlobalMinMaxQParamsCalculator",
    "MovingAverageQParamsCalculator",
    "QParamsCalculatorBase",
    "RunningRangeMixin",
    "StatefulQParamsCalculatorBase",
    "StatelessQParamsCalculatorBase",
    "StaticQParamsCalculator",
]

QParams = tuple[Tensor, Tensor | None, Tensor | None]


class QParamsCalculatorBase(ClassRegistryMixin, HasGeneration):
    """Base of the calculators. Subclasses are named in a specification by their key in this registry.

    Args:
        dtype: dtype of the quantized values.
        qscheme: how the quantized values lie around zero.
        granularity: which elements share parameters.
        target_dtype: dtype that holds one quantized value.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        range_calculator: computes the range of each block.
        float_range: fixed lower and upper end of the range, None for an end to compute.
        scale_dtype: ``torch.float8_e8m0fnu`` for power-of-two scales, else None.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: QuantizationScheme,
        granularity: QuantizationGranularity,
        target_dtype: torch.dtype,
        quant_min: float,
        quant_max: float,
        range_calculator: RangeCalculatorBase,
        float_range: Sequence[float | None],
        scale_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.qscheme = qscheme
        self._granularity = granularity
        self.target_dtype = target_dtype
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.float_range = float_range
        self.scale_dtype = scale_dtype
        self.range_calculator = range_calculator

    @property
    def granularity(self) -> QuantizationGranularity:
        """Which elements share parameters. Fixed once the calculator holds parameters (RuntimeError)."""
        return self._granularity

    @granularity.setter
    def granularity(self, granularity: QuantizationGranularity) -> None:
        if self._is_initialized():
            raise RuntimeError(
                f"granularity is fixed once parameters exist, here for {self._granularity}: "
                f"assign it before the first forward, or make a new calculator"
            )
        self._granularity = granularity
        self.range_calculator.granularity = granularity

    @property
    def quantization_target(self) -> CompressionTargetTensor:
        """The tensor's role."""
        return self.range_calculator.quantization_target

    @property
    def scale_format(self) -> ScaleFormat:
        """The engine's name for what scales are rounded to."""
        return _numbers.scale_format_of(self.scale_dtype)

    def _is_initialized(self) -> bool:
        return False

    def _get_min_and_max_val(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of the blocks' ranges, widened to contain zero."""
        _numbers.check_range(self.dtype, self.quant_min, self.quant_max)
        low, high = self.float_range
        if low is not None and high is not None:
            block_size = self.range_calculator.get_block_size(tensor.shape)
            grid = [size // block for size, block in zip(tensor.shape, block_size, strict=True)]
            min_val = torch.full(grid, float(low), device=tensor.device)
            max_val = torch.full(grid, float(high), device=tensor.device)
        else:
            min_val, max_val = self.range_calculator(tensor)
            if low is not None:
                min_val = torch.full_like(min_val, low)
            if high is not None:
                max_val = torch.full_like(max_val, high)
        # Not clamp, which hands the whole gradient on to a bound that is zero; these hand on half of it.
        return min_val.minimum(torch.zeros_like(min_val)), max_val.maximum(torch.zeros_like(max_val))

    def compute_qparams(self, tensor: Tensor, min_val: Tensor, max_val: Tensor) -> QParams:
        """Parameters for ranges from ``min_val`` to ``max_val``.

        Args:
            tensor: the tensor that has the ranges.
            min_val: lower ends, one value a block.
            max_val: upper ends, same shape.

        Returns:
            Scale (float32), zero point (int32) and minimum (float32), of the shape of ``min_val``; the last
            two are None for floating-point dtypes.
        """
        return coreai_kernels.choose_qparams(
            min_val,
            max_val,
            scheme=self.qscheme.kernel_scheme,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            format=_numbers.format_of(self.dtype),
            scale_format=self.scale_format,
        )

    @abstractmethod
    def forward(self, tensor: Tensor) -> QParams:
        """Parameters for ``tensor``, as :meth:`compute_qparams` returns them."""


class StatefulQParamsCalculatorBase(QParamsCalculatorBase):
    """Base of calculators that keep the parameters of the last observation, in buffers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._export_mode = False
        self.scale: Tensor
        self.zero_point: Tensor | None
        self.minval: Tensor | None
        self.register_buffer("scale", torch.empty(UNSHAPED))
        if _numbers.is_float_format(self.dtype):
            self.zero_point = self.minval = None
        else:
            self.register_buffer("zero_point", torch.empty(UNSHAPED, dtype=torch.int32))
            self.register_buffer("minval", torch.empty(UNSHAPED))

    def _is_initialized(self) -> bool:
        return is_shaped(self.scale)

    def _has_fixed_range(self) -> bool:
        return None not in self.float_range

    def _store(self, qparams: QParams) -> None:
        for name, value in zip(("scale", "zero_point", "minval"), qparams, strict=True):
            buffer = getattr(self, name)
            if buffer is None or value is None:
                continue
            if not is_shaped(buffer):
                reshape_buffer(self, name, value.shape, buffer.dtype)
                buffer = getattr(self, name)
            _copy_to_buffer(name, buffer, value)

    def forward(self, tensor: Tensor) -> QParams:
        """Observe ``tensor``; keep and return its parameters.

        In export mode, and with a fixed range after the first time, the kept ones are returned instead.

        Raises:
            RuntimeError: the tensor has another grid of blocks than the one observed before. Axes with a
                single block do not count, so per-tensor parameters serve tensors of all ranks.
            ValueError: the granularity does not fit the tensor's shape, or the quantized range its
                dtype.
        """
        if self._export_mode or (self._is_initialized() and self._has_fixed_range()):
            return self.scale, self.zero_point, self.minval
        min_val, max_val = self._get_min_and_max_val(tensor)
        if self._is_initialized() and same_blocks(min_val.shape, self.scale.shape):
            min_val, max_val = min_val.reshape(self.scale.shape), max_val.reshape(self.scale.shape)
        qparams = self.compute_qparams(tensor, min_val, max_val)
        self._store(qparams)
        return qparams

    def get_qparams(self) -> QParams:
        """The kept scale, zero point and minimum. Warns (UserWarning) if nothing has been observed."""
        if not self._is_initialized():
            warnings.warn(
                "no tensor has been observed yet: these are empty parameters, and a forward fills them",
                UserWarning,
                stacklevel=2,
            )
        return self.scale, self.zero_point, self.minval

    def set_export_mode(self, enabled: bool = True) -> None:
        """Stop observing, and return the kept parameters; or go back."""
        self._export_mode = enabled

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if (
                isinstance(loaded, Tensor)
                and buffer is not None
                and not is_shaped(buffer)
                and is_shaped(loaded)
            ):
                # The running range has the dtype of what was observed; the others have the module's.
                dtype = loaded.dtype if name.startswith("running_") else buffer.dtype
                reshape_buffer(self, name, loaded.shape, dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The kept parameters."""
        return (
            f"scale={self.scale}, zero_point={self.zero_point}, minval={self.minval}, "
            f"export_mode={self._export_mode}"
        )


class StatelessQParamsCalculatorBase(QParamsCalculatorBase):
    """Base of calculators whose parameters depend on the tensor at hand alone.

    Raises:
        ValueError: an end of the range is fixed.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if list(self.float_range) != [None, None]:
            raise ValueError(
                f"StatelessQParamsCalculatorBase requires float_range=[None, None]; got {self.float_range}. "
                f"A fixed range contradicts parameters that follow from each tensor."
            )

    def forward(self, tensor: Tensor) -> QParams:
        """Parameters for ``tensor``. Keeps nothing.

        Raises:
            ValueError: the granularity does not fit the tensor's shape.
        """
        return self.compute_qparams(tensor, *self._get_min_and_max_val(tensor))

    def set_export_mode(self, enabled: bool = True) -> None:
        """Not possible: NotImplementedError if ``enabled``."""
        if enabled:
            raise NotImplementedError(
                "Stateless quantization (e.g. dynamic) does not support export mode; "
                "qparams are input-dependent and cannot be frozen for export."
            )


class RunningRangeMixin:
    """Adds a running range to a stateful calculator, which derives from this class first.

    The first observation sets the range; each later one calls :meth:`update_running_range`, and the
    parameters follow from the result. The buffers ``running_min`` and ``running_max`` have the dtype of the
    first tensor.
    """

    running_min: Tensor
    running_max: Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        module = cast(nn.Module, self)
        module.register_buffer("running_min", torch.empty(UNSHAPED))
        module.register_buffer("running_max", torch.empty(UNSHAPED))

    def compute_qparams(self, tensor: Tensor, min_val: Tensor, max_val: Tensor) -> QParams:
        """Bring ``min_val`` and ``max_val`` into the running range, and return the parameters for that.

        Raises:
            RuntimeError: the running range has another shape.
        """
        module = cast(nn.Module, self)
        if is_shaped(self.running_min):
            min_val, max_val = self.update_running_range(min_val, max_val)
        else:
            reshape_buffer(module, "running_min", min_val.shape, min_val.dtype)
            reshape_buffer(module, "running_max", max_val.shape, max_val.dtype)
        _copy_to_buffer("running_min", self.running_min, min_val)
        _copy_to_buffer("running_max", self.running_max, max_val)
        # Not from the buffers, which may hold less of it: another dtype than the observation's.
        return super().compute_qparams(tensor, min_val, max_val)  # type: ignore[misc]

    def set_running_range(self, min_val: Tensor, max_val: Tensor) -> None:
        """Go on from another running range, of the shape that there is, and keep the parameters for it."""
        module: Any = self
        _copy_to_buffer("running_min", self.running_min, min_val)
        _copy_to_buffer("running_max", self.running_max, max_val)
        module._store(super().compute_qparams(min_val, min_val, max_val))  # type: ignore[misc]

    @abstractmethod
    def update_running_range(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The new running minimum and maximum, from an observation and the buffers."""

    def extra_repr(self) -> str:
        """The kept parameters and the running range."""
        inherited = super().extra_repr()  # type: ignore[misc]
        return f"{inherited}\nrunning_min={self.running_min}, running_max={self.running_max}"


@QParamsCalculatorBase.register("default")
class _DefaultQParamsCalculator(QParamsCalculatorBase):
    """Stands in a specification for the usual calculator of a tensor's role; the factory replaces it."""


@QParamsCalculatorBase.register("static")
class StaticQParamsCalculator(StatefulQParamsCalculatorBase):
    """The parameters of the last tensor observed."""


@QParamsCalculatorBase.register("dynamic")
class DynamicQParamsCalculator(StatelessQParamsCalculatorBase):
    """The parameters of the tensor at hand, at inference too. Activations only.

    After a forward in eager mode, ``scale``, ``zero_point`` and ``minval`` are those of its tensor, to look
    at: they belong to no state and serve no later forward.
    """

    def forward(self, tensor: Tensor) -> QParams:
        """See the base."""
        qparams = super().forward(tensor)
        scale, zero_point, minval = (None if value is None else value.detach() for value in qparams)
        self.show((cast(Tensor, scale), zero_point, minval))
        return qparams

    def show(self, qparams: QParams) -> None:
        """Have the attributes tell these parameters; the settings are the same generation as before."""
        if not torch.compiler.is_compiling():
            self.__dict__.update(zip(("scale", "zero_point", "minval"), qparams, strict=True))


@QParamsCalculatorBase.register("moving_average")
class MovingAverageQParamsCalculator(RunningRangeMixin, StatefulQParamsCalculatorBase):
    """The parameters of an exponential moving average of the ranges.

    Args:
        averaging_constant: the weight of a new observation.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        qscheme: QuantizationScheme,
        granularity: QuantizationGranularity,
        target_dtype: torch.dtype,
        quant_min: float,
        quant_max: float,
        range_calculator: RangeCalculatorBase,
        float_range: Sequence[float | None],
        averaging_constant: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dtype=dtype,
            qscheme=qscheme,
            granularity=granularity,
            target_dtype=target_dtype,
            quant_min=quant_min,
            quant_max=quant_max,
            range_calculator=range_calculator,
            float_range=float_range,
            **kwargs,
        )
        self.averaging_constant = averaging_constant

    def update_running_range(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The observation times the averaging constant, plus the running range times the rest."""
        new, old = self.averaging_constant, 1 - self.averaging_constant
        _check_same_blocks("running_min", self.running_min, min_val)
        return min_val * new + self.running_min * old, max_val * new + self.running_max * old


@QParamsCalculatorBase.register("global_minmax")
class GlobalMinMaxQParamsCalculator(RunningRangeMixin, StatefulQParamsCalculatorBase):
    """The parameters of the range that covers everything observed."""

    def update_running_range(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The smaller minimum and the larger maximum of the observation and the running range."""
        _check_same_blocks("running_min", self.running_min, min_val)
        # Copies: the buffers change in place, and a gradient needs what they held.
        low, high = self.running_min.clone(), self.running_max.clone()
        return torch.minimum(min_val, low), torch.maximum(max_val, high)


def _check_same_blocks(name: str, buffer: Tensor, value: Tensor) -> None:
    if buffer.shape != value.shape:
        raise RuntimeError(
            f"the tensor has blocks of shape {tuple(value.shape)}, but {name} was observed for "
            f"{tuple(buffer.shape)}: a fake quantizer serves tensors of one grid of blocks"
        )


def _copy_to_buffer(name: str, buffer: Tensor, value: Tensor) -> None:
    _check_same_blocks(name, buffer, value)
    with torch.no_grad():
        buffer.copy_(value)
