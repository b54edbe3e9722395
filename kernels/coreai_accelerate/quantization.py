"""Apple's fake quantizer, with a forward of the engine.

The subclass has Apple's constructor, buffers and methods. Its forward reads the settings of the three modules
(fake quantizer, calculator, range calculator) and calls the engine's fused operator on the calculator's own
buffers. Whatever is not exactly Apple's (a subclass's method, another calculator, a hook) goes Apple's way.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from coreai_accelerate.state import STATE, PickledAs, Replacement, fall_back, has_kernels
from coreai_kernels import Format, QuantConfig, RangeUpdate, ScaleFormat, Scheme, grid_shape
from coreai_kernels.formats import NUMBER_FORMATS
from coreai_kernels.ops import fake_quantize, observe_and_fake_quantize
from coreai_kernels.runtime import Generation, Guarded, capture
from coreai_opt.quantization.spec import qparams_calculator as calculators
from coreai_opt.quantization.spec import range_calculator as ranges
from coreai_opt.quantization.spec.fake_quantize import _DefaultFakeQuantizeImpl

__all__ = ["FusedFakeQuantize", "replacements"]

_BUFFERS = ("scale", "zero_point", "minval", "running_min", "running_max")
_FLAG_BUFFERS = ("_disabled", "fake_quant_enabled", "observer_enabled")
# Mirrors of the flags on the host, which rule from 0.4.0 on.
_FLAG_MIRRORS = ("_disabled_flag", "_fake_quant_on", "_observer_on")

_UPDATES = {
    calculators.StaticQParamsCalculator: RangeUpdate.LATEST,
    calculators.MovingAverageQParamsCalculator: RangeUpdate.MOVING_AVERAGE,
    calculators.GlobalMinMaxQParamsCalculator: RangeUpdate.GLOBAL_MINMAX,
    calculators.DynamicQParamsCalculator: RangeUpdate.LATEST,
}
_SCHEMES = {
    "symmetric": Scheme.SYMMETRIC,
    "symmetric_with_clipping": Scheme.SYMMETRIC_WITH_CLIPPING,
    "asymmetric": Scheme.ASYMMETRIC,
}
_FORMATS = {getattr(torch, name): row.format for name, row in NUMBER_FORMATS.items()}
_SCALE_FORMATS = {None: ScaleFormat.FLOAT32, torch.float8_e8m0fnu: ScaleFormat.E8M0}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Methods and settings that decide what a forward does. Those that an instance does not hold are guarded, too:
# it must go on not to.
_METHODS = (
    *("quantize", "dequantize", "get_block_size", "calculate_qparams", "_fused_fake_quant_dequant"),
    *("_quantize_int", "_quantize_float", "_dequantize_int", "_dequantize_float", "_select_int_offsets"),
)
_CALCULATOR_METHODS = (
    *("forward", "compute_qparams", "get_qparams", "update_running_range", "_get_min_and_max_val"),
    *("_compute_scale_zero_point_minval", "_compute_e8m0_scale", "_resolve_axis"),
)
_CALCULATOR_SLOTS = (
    *("dtype", "qscheme", "quant_min", "quant_max", "scale_dtype", "float_range", "averaging_constant"),
    *("_export_mode", "_initialized", "_granularity"),
    *_CALCULATOR_METHODS,
)
_RANGE_METHODS = ("forward", "_generate_min_max", "_reshape_min_max")
_RANGE_SLOTS = ("granularity", "quantization_target", *_RANGE_METHODS)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@functools.lru_cache(maxsize=4096)
def _config(*arguments: Any) -> tuple[QuantConfig, Tensor]:
    """A configuration, and the same packed: a function of its arguments alone."""
    config = QuantConfig(*arguments)
    return config, config.packed()


class FusedFakeQuantize(_DefaultFakeQuantizeImpl, PickledAs):
    """Apple's default fake quantizer, whose forward is the engine's."""

    _pickled_as = _DefaultFakeQuantizeImpl

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; what was captured for the settings before is stale, but for the training mode."""
        super().__setattr__(name, value)
        if name != "training" and not torch.compiler.is_compiling():
            _generation_of(self).advance()

    def _get_name(self) -> str:
        return _DefaultFakeQuantizeImpl.__name__  # a printed model looks as it did

    def __getstate__(self) -> dict[str, Any]:
        own = ("_captured", "_generation")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    # torch.__future__.set_swap_module_params_on_conversion: torch swaps only tensors that nobody else holds.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.pop("_captured", None)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__.pop("_captured", None)
        super()._load_from_state_dict(*args)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_captured", None)
        return replica

    def forward(self, tensor: Tensor) -> Tensor:
        """Observe and simulate ``tensor``, as Apple's forward does."""
        if torch.compiler.is_compiling():
            _count_traced()
            return super().forward(tensor)
        captured = self.__dict__.get("_captured")
        if captured is not None:
            output = captured(tensor)
            if output is not None:
                return output
        output = _fused(self, tensor)
        return super().forward(tensor) if output is None else output


# Evaluated while a program is traced: the counter is no part of it.
@torch.compiler.assume_constant_result
def _count_traced() -> None:
    fall_back("compiled or exported program")


def _generation_of(module: FusedFakeQuantize) -> Generation:
    own = module.__dict__
    found = own.get("_generation")
    if found is None:
        found = own["_generation"] = Generation()
    return found  # type: ignore[no-any-return]


def _flags(module: FusedFakeQuantize) -> tuple[bool, bool, bool]:
    """Whether the module is disabled, simulates, observes."""
    own = module.__dict__
    if _FLAG_MIRRORS[0] in own:
        return tuple(own[name] for name in _FLAG_MIRRORS)  # type: ignore[return-value]
    return tuple(bool(module._buffers[name]) for name in _FLAG_BUFFERS)  # type: ignore[return-value, arg-type]


def _refusal(module: FusedFakeQuantize, tensor: Tensor, calculator: Any, observes: bool) -> str | None:
    """Why the engine does not do what Apple's forward would; None if it does."""
    if not STATE.is_active:
        return "not active"
    if torch.jit.is_tracing():
        return "compiled or exported program"
    if not isinstance(tensor, Tensor) or tensor.numel() == 0:
        return "no elements"
    if tensor.dtype not in _DTYPES:
        return str(tensor.dtype).removeprefix("torch.")
    if not has_kernels(tensor):
        return "no compiled library"
    if not _has_methods_of(module, _DefaultFakeQuantizeImpl, _METHODS):
        return "methods"
    its_ranges = getattr(calculator, "range_calculator", None)
    if type(calculator) not in _UPDATES or type(its_ranges) is not ranges.MinMaxRangeCalculator:
        return "calculator"
    if any(_listens(vars(each)[name]) for each in (calculator, its_ranges) for name in _HOOKS):
        return "hooks"
    if _listens(torch_module._global_forward_hooks) or _listens(torch_module._global_forward_pre_hooks):
        return "hooks"
    if {*_CALCULATOR_METHODS} & vars(calculator).keys() or {*_RANGE_METHODS} & vars(its_ranges).keys():
        return "methods"
    if not vars(calculator).get("_initialized", True) or calculator.scale.numel() == 0:
        return "first observation"
    if observes and (None not in calculator.float_range or getattr(calculator, "_export_mode", False)):
        return "fixed range"
    if observes and not (
        calculator.dtype == module.dtype
        and calculator.quant_min == module.quant_min
        and calculator.quant_max == module.quant_max
        and its_ranges.granularity == module.granularity
        and its_ranges.quantization_target == module.quantization_target
    ):
        return "settings that differ"
    if observes and not _holds(module.target_dtype, module.quant_min, module.quant_max):
        return "range of the quantized values"  # Apple's forward says so
    return None if calculator.scale_dtype in _SCALE_FORMATS else "scale format"


def _holds(dtype: torch.dtype, low: float, high: float) -> bool:
    """Whether an integer dtype has the values from ``low`` to ``high``; others are not looked at."""
    if dtype.is_floating_point:
        return True
    limits = torch.iinfo(dtype)
    return limits.min <= low and high <= limits.max


def _listens(hooks: dict[int, Any]) -> bool:
    """Whether a hook is somebody's else than Apple's, whose own keep track of the modules that run."""
    return any(not str(getattr(hook, "__module__", "")).startswith("coreai_opt.") for hook in hooks.values())


def _has_methods_of(module: Any, apple: type, names: tuple[str, ...]) -> bool:
    cls = type(module)
    if cls.forward is not FusedFakeQuantize.forward or not vars(module).keys().isdisjoint(names):
        return False
    return all(getattr(cls, name, None) is getattr(apple, name, None) for name in names)


def _fused(module: FusedFakeQuantize, tensor: Tensor) -> Tensor | None:
    """The forward's output from the engine; None if Apple's forward has to run."""
    disabled, simulates, observes = _flags(module)
    calculator: Any = module._modules["qparams_calculator"]
    is_dynamic = type(calculator) is calculators.DynamicQParamsCalculator
    observes |= is_dynamic
    if disabled or not (simulates or observes):
        return None
    reason = _refusal(module, tensor, calculator, observes)
    if reason is not None:
        fall_back(reason)
        return None
    try:
        block_size = tuple(module.get_block_size(tensor.shape))
        grid = grid_shape(tensor.shape, block_size)
    except (ValueError, IndexError):
        fall_back("block size")  # Apple's forward says what does not fit
        return None
    arguments = _arguments(module, calculator, block_size)
    if is_dynamic:
        return _dynamic(calculator, tensor, grid, arguments, simulates)
    state = tuple(calculator._buffers.get(name) for name in _BUFFERS)
    running = state[3]
    is_running = _UPDATES[type(calculator)] != RangeUpdate.LATEST
    is_integer = _FORMATS.get(module.dtype, Format.INT) == Format.INT
    needed = state[:1] + state[1:3] * is_integer + state[3:] * is_running
    if any(each is None for each in needed):
        fall_back("state of another shape")
        return None
    if state[0].shape != grid or state[0].device != tensor.device:
        fall_back("state of another shape")
        return None
    if any(each is not None and each.dtype == torch.float64 for each in state):
        fall_back("float64")
        return None
    if running is not None and (running.shape != grid or running.dtype != tensor.dtype):
        fall_back("running range of another dtype")
        return None
    if not simulates:
        observe_and_fake_quantize.observe(tensor, state, running is not None, _config(*arguments)[0])
        return tensor
    return (
        _step(module, tensor, state, arguments) if observes else _simulate(module, tensor, state, arguments)
    )


def _dynamic(
    calculator: Any, tensor: Tensor, grid: tuple[int, ...], arguments: tuple[Any, ...], simulates: bool
) -> Tensor:
    """The step of a calculator that keeps no state: it shows what it has computed last, no more."""
    config, packed = _config(*arguments)
    scale = tensor.new_empty(grid, dtype=torch.float32)
    zero_point = minval = None
    if config.format == Format.INT:
        zero_point, minval = torch.empty_like(scale, dtype=torch.int32), torch.empty_like(scale)
    state = (scale, zero_point, minval, None, None)
    if simulates:
        output = observe_and_fake_quantize.apply(tensor, state, False, config, packed)
    else:
        output = tensor
        observe_and_fake_quantize.observe(tensor, state, False, config)
    if config.scale_format == ScaleFormat.FLOAT32:  # shown in the tensor's dtype
        scale = scale.to(tensor.dtype)
    calculator.scale, calculator.zero_point = scale, zero_point
    calculator.minval = None if minval is None else minval.to(tensor.dtype)
    return output


def _arguments(module: FusedFakeQuantize, calculator: Any, block_size: tuple[int, ...]) -> tuple[Any, ...]:
    fmt = _FORMATS.get(module.dtype, Format.INT)
    return (
        block_size,
        int(_SCHEMES[calculator.qscheme.value]),
        int(fmt),
        float(module.quant_min),
        float(module.quant_max),
        fmt == Format.INT and module.qformulation.value == "minval",
        int(_UPDATES[type(calculator)]),
        float(getattr(calculator, "averaging_constant", 0.0)),
        *calculator.float_range,
        int(_SCALE_FORMATS[calculator.scale_dtype]),
    )


def _step(
    module: FusedFakeQuantize, tensor: Tensor, state: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Tensor:
    config, packed = _config(*arguments)
    has_running = state[3] is not None
    output = observe_and_fake_quantize.apply(tensor, state, has_running, config, packed)
    if observe_and_fake_quantize.is_plain(tensor, state):
        _capture(module, "observe_and_fake_quantize_", tensor, (*state, has_running, packed))
    return output


def _simulate(
    module: FusedFakeQuantize, tensor: Tensor, state: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Tensor:
    config, _ = _config(*arguments)
    zero_point, minval = config.parameters(state[1], state[2])
    params = (state[0], zero_point, minval)
    values = (config.block_size, config.format, config.quant_min, config.quant_max)
    output = fake_quantize.apply(tensor, *params, *values)
    if observe_and_fake_quantize.is_plain(tensor, params):
        _capture(module, "fake_quantize_forward", tensor, (*params, *values))
    return output


def _capture(module: FusedFakeQuantize, operator: str, tensor: Tensor, args: tuple[Any, ...]) -> None:
    own = module.__dict__
    own["_captured"] = capture(own.get("_captured"), lambda: _guarded(module), operator, tensor, args)


def _guarded(module: FusedFakeQuantize) -> Guarded:
    calculator: Any = module._modules["qparams_calculator"]
    its_ranges: Any = calculator._modules["range_calculator"]
    has_mirrors = _FLAG_MIRRORS[0] in module.__dict__
    switches: list[Any] = [] if has_mirrors else [module._buffers[name] for name in _FLAG_BUFFERS]
    return Guarded(
        slots=[
            (vars(STATE), "is_active"),
            (_generation_of(module), Generation.KEY),
            (module._modules, "qparams_calculator"),
            (calculator._modules, "range_calculator"),
            *((vars(calculator), name) for name in _CALCULATOR_SLOTS),
            *((vars(its_ranges), name) for name in _RANGE_SLOTS),
            *((calculator._buffers, name) for name in _BUFFERS),
            *((module._buffers, name) for name in _FLAG_BUFFERS),
        ],
        switches=switches,
        hooks=[
            *(vars(each)[name] for each in (calculator, its_ranges) for name in _HOOKS),
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ],
        classes=[type(module), type(calculator), type(its_ranges)],
    )


def replacements() -> list[Replacement]:
    """The fake quantizer that specifications get by default."""
    return [Replacement("fake quantizer", _DefaultFakeQuantizeImpl, FusedFakeQuantize)]
