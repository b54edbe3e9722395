"""What a fake quantizer's forward needs to know about a tensor, worked out once for each shape and dtype.

A training step calls the forward of every simulator; this takes the reading of specifications out of it.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from coreai_kernels import Format, QuantConfig, RangeUpdate, grid_shape
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.quantization.spec import _numbers, qparams_calculator, range_calculator
from coreai_opt.quantization.spec._generation import generation_of
from coreai_opt.quantization.spec._state import is_shaped, reshape_buffer, same_blocks
from coreai_opt.quantization.spec.granularity import QuantizationGranularity
from coreai_opt.quantization.spec.qformulation import QuantizationFormulation

__all__ = [
    "STATE",
    "Facts",
    "FakeQuantizer",
    "Plans",
    "QuantizationPlan",
    "facts_of",
    "make_plan",
    "plan_for",
    "remember_methods",
    "same_methods",
    "settings_generation",
    "simulates_as_built_in",
    "state_for",
]

State = tuple[Tensor | None, ...]

# More shapes than a model's activations usually take; a table that outgrows it starts anew.
_MOST_PLANS = 256

# Buffers of a calculator, as far as it has them, that the fused training step updates.
STATE = ("scale", "zero_point", "minval", "running_min", "running_max")

_FORWARD_METHODS = ("forward", "calculate_qparams", "_forward_in_parts", "_simulate")
_SIMULATION_METHODS = ("get_block_size", "_fused_fake_quant_dequant")

_RANGE_METHODS = ("forward", "get_block_size", "_generate_min_max", "_reshape_min_max")
_CALCULATOR_METHODS = ("forward", "compute_qparams", "_get_min_and_max_val", "_store", "update_running_range")
_RANGE_UPDATES = {
    qparams_calculator.StaticQParamsCalculator: RangeUpdate.LATEST,
    qparams_calculator.DynamicQParamsCalculator: RangeUpdate.LATEST,
    qparams_calculator.MovingAverageQParamsCalculator: RangeUpdate.MOVING_AVERAGE,
    qparams_calculator.GlobalMinMaxQParamsCalculator: RangeUpdate.GLOBAL_MINMAX,
}


Facts = tuple[int, float, float, bool, bool, bool, bool, bool, QuantConfig | None]


class FakeQuantizer(Protocol):
    """What plans are made from: a module of which this file needs no more."""

    dtype: torch.dtype
    qformulation: QuantizationFormulation
    quant_min: int | float
    quant_max: int | float
    qparams_calculator: qparams_calculator.QParamsCalculatorBase
    tensor_fqn: str
    _plans: "Plans"
    _modules: dict[str, nn.Module | None]

    @property
    def granularity(self) -> QuantizationGranularity: ...

    @property
    def quantization_target(self) -> CompressionTargetTensor: ...

    @property
    def is_stateless(self) -> bool: ...

    @classmethod
    def built_in_class(cls) -> type: ...

    def facts(self) -> Facts: ...

    def get_block_size(self, tensor_shape: torch.Size) -> tuple[int, ...]: ...


class QuantizationPlan:
    """How to quantize tensors of one shape, with the module's settings as they are now.

    Attributes:
        block_size, grid: extent of a block, and number of blocks, along each axis.
        values: ``block_size``, format and range of the quantized values, as the fused operators take them.
        uses_minval: whether the formulation is the min-value one; never for floating-point values.
        is_stateless: whether the calculator keeps nothing.
        keeps_range: whether it keeps a running range.
        is_built_in: whether the forward quantizes as the built-in class's does.
        config: settings of the fused training step, None if the modules' methods do something else.
        packed_config: the same as eager mode's operator takes it.
        state: buffers that have been found to suit the fused training step.
        made_for: the generation of the settings that it was made from.
    """

    __slots__ = (
        "block_size",
        "config",
        "grid",
        "is_built_in",
        "is_integer",
        "is_stateless",
        "keeps_range",
        "made_for",
        "packed_config",
        "state",
        "uses_minval",
        "values",
    )

    def __init__(self, module: FakeQuantizer, shape: torch.Size) -> None:
        is_eager = not torch.compiler.is_compiling()
        fmt, quant_min, quant_max, *flags, config = module.facts()
        self.is_integer, self.uses_minval, self.is_stateless, self.keeps_range, self.is_built_in = flags
        self.block_size = module.get_block_size(shape)
        self.values: tuple[tuple[int, ...], int, float, float] = (self.block_size, fmt, quant_min, quant_max)
        # Blocks without elements have no range; the observation says so.
        is_empty = 0 in self.block_size
        self.grid = () if is_empty else grid_shape(shape, self.block_size)
        self.config = None if is_empty or config is None else config.with_block_size(self.block_size)
        self.packed_config = self.config.packed() if is_eager and self.config is not None else None
        self.state: State = (None,) * 5
        self.made_for: tuple[object, ...] = ()

    def select(
        self, scale: Tensor, zero_point: Tensor | None, minval: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The parameters of the formulation in use, in the shape of the grid.

        Raises:
            ValueError: one is missing, or given for floating-point values.
            RuntimeError: one has not one value per block.
        """
        scale = self._in_grid("scale", scale)
        if not self.is_integer:
            if zero_point is not None or minval is not None:
                raise ValueError("zero_point and minval must be None for floating-point quantization")
            return scale, None, None
        name, value = ("minval", minval) if self.uses_minval else ("zero_point", zero_point)
        if value is None:
            raise ValueError(f"{name} must not be None for integer quantization that uses it")
        value = self._in_grid(name, value)
        return (scale, None, value) if self.uses_minval else (scale, value, None)

    def _in_grid(self, name: str, value: Tensor) -> Tensor:
        if value.shape == self.grid:
            return value
        if value.numel() != math.prod(self.grid):
            raise RuntimeError(
                f"{name} must have one value for each of the blocks {self.grid}; "
                f"got shape {tuple(value.shape)}"
            )
        return value.reshape(self.grid)


def make_plan(module: FakeQuantizer, tensor: Tensor) -> QuantizationPlan:
    """The plan for ``tensor``.

    Raises:
        TypeError: it is not floating point.
        ValueError: the granularity does not fit its shape.
    """
    if not tensor.is_floating_point():
        raise TypeError(
            f"tensor {module.tensor_fqn!r} must be floating point to be quantized; got {tensor.dtype}"
        )
    return QuantizationPlan(module, tensor.shape)


def plan_for(module: FakeQuantizer, tensor: Tensor) -> QuantizationPlan:
    """The same, kept for the generation of the module's settings."""
    if torch.compiler.is_compiling():
        return make_plan(module, tensor)
    # Read before the settings: if another thread changes them meanwhile, the plan is made anew the next time.
    plans, generation = module._plans, settings_generation(module)
    key = (tensor.shape, tensor.dtype)
    plan = plans.get(key)
    if plan is None or plan.made_for != generation:
        if plan is not None or len(plans) >= _MOST_PLANS:
            plans.clear()  # of other settings, or too many
        plan = make_plan(module, tensor)
        plan.made_for = generation
        plans[key] = plan
    return plan


class Plans(dict[tuple[torch.Size, torch.dtype], QuantizationPlan]):
    """A module's plans by shape and dtype."""


def settings_generation(module: FakeQuantizer) -> tuple[object, ...]:
    """What is equal as long as no setting of the module, its calculator and its range calculator changes."""
    calculator = module._modules.get("qparams_calculator")
    ranges = calculator and calculator._modules.get("range_calculator")
    if calculator is None or ranges is None:
        return (object(),)  # equal to nothing: the methods decide each time
    parts: tuple[Any, ...] = (module, calculator, ranges)
    generations = [generation_of(each).now for each in parts]
    # Methods can be replaced on classes, too, which no instance notices.
    return (calculator, ranges, *generations, _range_update_of(module), _forwards_as_built_in(module))


def state_for(plan: QuantizationPlan, calculator: Any, tensor: Tensor) -> tuple[State, bool] | None:
    """The tensors that the fused step updates, and whether they hold a running range.

    None if the step cannot update them: a running range of another dtype than the tensor's, or one of them
    that is a buffer no more.

    Raises:
        RuntimeError: they are for another grid of blocks, or on another device.
    """
    if plan.is_stateless:
        return (*_new_params(plan, tensor), None, None), False
    get = calculator._buffers.get
    scale, zero_point, minval = get("scale"), get("zero_point"), get("minval")
    running_min, running_max = get("running_min"), get("running_max")
    known = plan.state
    if (
        known[0] is scale
        and known[1] is zero_point
        and known[2] is minval
        and known[3] is running_min
        and known[4] is running_max
    ):
        _require_same_device(tensor, known[:1])
        return known, plan.keeps_range
    state = (scale, zero_point, minval, running_min, running_max)
    needed = [scale, *([zero_point, minval] if plan.is_integer else []), *state[3:5] * plan.keeps_range]
    if any(each is None for each in needed):
        return None
    _require_same_device(tensor, state)
    if scale.shape == plan.grid and (
        not plan.keeps_range or (running_min.shape == plan.grid and running_min.dtype == tensor.dtype)
    ):
        plan.state = state
        return plan.state, plan.keeps_range
    return _state_of_other_shape(plan, calculator, tensor)


def _require_same_device(tensor: Tensor, state: State) -> None:
    for each in state:
        if each is not None and each.device != tensor.device:
            raise RuntimeError(
                f"the tensor is on {tensor.device}, its fake quantizer on {each.device}: "
                f"move the module with .to({str(tensor.device)!r})"
            )


def _new_params(plan: QuantizationPlan, tensor: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Room for the parameters of a tensor whose calculator keeps none."""
    scale = tensor.new_empty(plan.grid, dtype=torch.float32)
    if not plan.is_integer:
        return scale, None, None
    return scale, torch.empty_like(scale, dtype=torch.int32), torch.empty_like(scale)


def _state_of_other_shape(
    plan: QuantizationPlan, calculator: Any, tensor: Tensor
) -> tuple[State, bool] | None:
    has_running = is_shaped(calculator.running_min) if plan.keeps_range else False
    if has_running and calculator.running_min.dtype != tensor.dtype:
        return None
    state: list[Tensor | None] = []
    for name in STATE:
        buffer = getattr(calculator, name, None)
        if buffer is not None:
            if not is_shaped(buffer):
                dtype = tensor.dtype if name.startswith("running_") else buffer.dtype
                reshape_buffer(calculator, name, torch.Size(plan.grid), dtype)
            buffer = _view_as_grid(plan.grid, name, getattr(calculator, name))
        state.append(buffer)
    return tuple(state), has_running


def _view_as_grid(grid: tuple[int, ...], name: str, buffer: Tensor) -> Tensor:
    if not same_blocks(buffer.shape, grid):
        raise RuntimeError(
            f"the tensor has blocks of shape {grid}, but {name} was observed for {tuple(buffer.shape)}: "
            f"a fake quantizer serves tensors of one grid of blocks"
        )
    return buffer.view(grid)


def facts_of(module: FakeQuantizer) -> Facts:
    """What a plan takes from the module, whatever the shape.

    Format and range of the quantized values, whether these are integers, whether the formulation is the
    min-value one, whether the calculator keeps nothing, whether it keeps a running range, whether the
    forward is the built-in one, and the settings of the fused training step but for its block size.
    """
    fmt = _numbers.format_of(module.dtype)
    _numbers.check_range(module.dtype, module.quant_min, module.quant_max)
    quant_min, quant_max = float(module.quant_min), float(module.quant_max)
    is_integer = fmt == Format.INT
    uses_minval = is_integer and module.qformulation == QuantizationFormulation.MINVAL
    update = _range_update_of(module)
    keeps_range = update is not None and update != RangeUpdate.LATEST
    calculator: Any = module.qparams_calculator
    config: QuantConfig | None = None
    if update is not None and _observes_for(calculator, module):
        low, high = calculator.float_range
        config = QuantConfig(
            block_size=(),
            scheme=int(calculator.qscheme.kernel_scheme),
            format=int(fmt),
            quant_min=quant_min,
            quant_max=quant_max,
            use_minval=uses_minval,
            update=int(update),
            averaging_constant=float(getattr(calculator, "averaging_constant", 0.0)),
            range_min=low,
            range_max=high,
            scale_format=int(calculator.scale_format),
        )
    # Plain values: torch.compile takes these as constants, and refuses enumerations, with which that of torch
    # 2.10 and 2.12 cannot even compare one.
    flags = (is_integer, uses_minval, module.is_stateless, keeps_range, _forwards_as_built_in(module))
    return int(fmt), quant_min, quant_max, *flags, config


def _observes_for(calculator: Any, module: FakeQuantizer) -> bool:
    """Whether the calculator observes at each forward, for the blocks and values of the module."""
    ranges = calculator.range_calculator
    return (
        not getattr(calculator, "_export_mode", False)
        and None in calculator.float_range
        and calculator.dtype == module.dtype
        and calculator.quant_min == module.quant_min
        and calculator.quant_max == module.quant_max
        and ranges.granularity == module.granularity
        and ranges.quantization_target == module.quantization_target
    )


def simulates_as_built_in(module: FakeQuantizer) -> bool:
    """Whether the module quantizes with the built-in methods, which the fused operators reproduce."""
    return same_methods(module, module.built_in_class(), _SIMULATION_METHODS)


def _forwards_as_built_in(module: FakeQuantizer) -> bool:
    return same_methods(module, module.built_in_class(), _FORWARD_METHODS + _SIMULATION_METHODS)


def _range_update_of(module: FakeQuantizer) -> RangeUpdate | None:
    """What the calculator does with a range; None unless all three modules have the built-in methods."""
    if not simulates_as_built_in(module):
        return None
    calculator = module.qparams_calculator
    ranges = getattr(calculator, "range_calculator", None)
    if ranges is None or not same_methods(ranges, range_calculator.MinMaxRangeCalculator, _RANGE_METHODS):
        return None
    if _is_hooked(vars(calculator), vars(ranges)):
        return None
    # Calculators with a running range call it by super().
    if qparams_calculator.QParamsCalculatorBase.compute_qparams is not _COMPUTE_QPARAMS:
        return None
    for built_in, update in _RANGE_UPDATES.items():
        if isinstance(calculator, built_in) and same_methods(calculator, built_in, _CALCULATOR_METHODS):
            return update
    return None


# Methods of built-in classes as they were written: a class can be patched, too.
_WRITTEN: dict[tuple[type, str], Any] = {}


def remember_methods(built_in: type, names: tuple[str, ...] = _FORWARD_METHODS + _SIMULATION_METHODS) -> None:
    """Note what :func:`same_methods` compares with, where the class is defined."""
    _WRITTEN.update({(built_in, name): getattr(built_in, name, None) for name in names})


_COMPUTE_QPARAMS = qparams_calculator.QParamsCalculatorBase.compute_qparams
remember_methods(range_calculator.MinMaxRangeCalculator, _RANGE_METHODS)
remember_methods(qparams_calculator.StatefulQParamsCalculatorBase, ("get_qparams",))
for _built_in in _RANGE_UPDATES:
    remember_methods(_built_in, _CALCULATOR_METHODS)


def same_methods(obj: object, built_in: type, names: tuple[str, ...]) -> bool:
    """Whether the object's methods of these names are those that the class ``built_in`` was written with."""
    if not vars(obj).keys().isdisjoint(names):
        return False
    cls = type(obj)
    return all(getattr(cls, name, None) is _WRITTEN[built_in, name] for name in names)


def _is_hooked(its: dict[str, Any], range_its: dict[str, Any]) -> bool:
    """Whether somebody listens to the calculators' calls, so that they must take place."""
    return bool(
        its["_forward_hooks"]
        or its["_forward_pre_hooks"]
        or range_its["_forward_hooks"]
        or range_its["_forward_pre_hooks"]
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )
