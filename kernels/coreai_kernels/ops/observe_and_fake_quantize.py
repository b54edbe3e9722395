"""``observe_and_fake_quantize``: the whole training step of a fake quantizer in one operator."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels import backends
from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.ops import checks, fake_quantize
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.quant_config import QuantConfig, taking_config, taking_packed_config
from coreai_kernels.reference.observe_and_fake_quantize import next_range
from coreai_kernels.reference.observe_and_fake_quantize import observe_and_fake_quantize as reference
from coreai_kernels.runtime.inductor import is_exporting, recompute_masks
from coreai_kernels.triton import registry as triton
from coreai_kernels.types import RangeUpdate, grid_shape

__all__ = ["apply", "check", "is_plain", "observe", "observe_and_fake_quantize"]

_STATE = ("scale", "zero_point", "minval", "running_min", "running_max")


def _fake(
    input: Tensor, running_min: Tensor | None, running_max: Tensor | None, block_size: list[int], *rest: Any
) -> tuple[Tensor, ...]:
    grid = grid_shape(input.shape, tuple(block_size))

    def values(dtype: torch.dtype) -> Tensor:
        return input.new_empty(grid, dtype=dtype)

    scale, zero_point, minval = values(torch.float32), values(torch.int32), values(torch.float32)
    mask = fake_quantize.mask_bytes(input, rest[-1])
    return torch.empty_like(input), mask, scale, zero_point, minval, values(input.dtype), values(input.dtype)


def _fake_in_place(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), fake_quantize.mask_bytes(input, rest[-1])


def _reference_in_place(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    running_min: Tensor | None,
    running_max: Tensor | None,
    has_running: bool,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    state = (scale, zero_point, minval, running_min, running_max)
    running = (running_min, running_max) if has_running else (None, None)
    output, mask, *new = reference(input, *running, config, with_mask)
    for old, value in zip(state, new, strict=True):
        if old is not None:
            old.copy_(value)
    return output, mask


_triton = triton.get("observe_and_fake_quantize")
_triton_in_place = triton.get("observe_and_fake_quantize_")

_STATE_ARGUMENTS = (
    "Tensor input, Tensor(a!) scale, Tensor(b!)? zero_point, Tensor(c!)? minval, Tensor(d!)? running_min, "
    "Tensor(e!)? running_max, bool has_running"
)

# In place: eager mode's, see `fake_quantize.straight_through` for its gradient.
define(
    "observe_and_fake_quantize_",
    f"({_STATE_ARGUMENTS}, Tensor config, bool with_mask) -> (Tensor, Tensor)",
    reference=taking_packed_config(_reference_in_place),
    fake=_fake_in_place,
    triton=taking_packed_config(_triton_in_place) if _triton_in_place else None,
)
# In place, with the settings as arguments, which may be symbols: that of compiled programs. The compiler's
# own analysis leaves the state where it is, so that nothing is copied, and the gradient is in the program, so
# that no call goes through Python's part of the dispatcher.
define(
    "observe_and_fake_quantize_unpacked_",
    f"({_STATE_ARGUMENTS}, {QuantConfig.SCHEMA}, bool with_mask) -> (Tensor, Tensor)",
    reference=taking_config(_reference_in_place),
    fake=_fake_in_place,
    triton=taking_config(_triton_in_place) if _triton_in_place else None,
)
# Functional, with a gradient: exported programs cannot differentiate operators that mutate.
define(
    "observe_and_fake_quantize",
    f"(Tensor input, Tensor? running_min, Tensor? running_max, {QuantConfig.SCHEMA}, "
    "bool with_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=taking_config(reference),
    fake=_fake,
    triton=taking_config(_triton) if _triton else None,
)


fake_quantize.register_straight_through("observe_and_fake_quantize")


def observe_and_fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minval: Tensor | None = None,
    running_min: Tensor | None = None,
    running_max: Tensor | None = None,
    *,
    block_size: tuple[int, ...],
    scheme: int,
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
    use_minval: bool = False,
    update: int = RangeUpdate.LATEST,
    has_running: bool = False,
    averaging_constant: float = 0.01,
    range_min: float | None = None,
    range_max: float | None = None,
    scale_format: int = ScaleFormat.FLOAT32,
) -> Tensor:
    """Observe ``input``, update the running range, choose parameters and fake-quantize with them.

    The same result as :func:`coreai_kernels.observe_range`, the range update,
    :func:`coreai_kernels.choose_qparams` and :func:`coreai_kernels.fake_quantize` one after the other, with
    as few passes over the input as its blocks allow. Straight-through gradient to ``input``. Nothing waits
    for the device.

    Args:
        input: float32, bfloat16, float16 or float64 tensor.
        scale: receives the scale; shape ``input.shape[i] / block_size[i]``.
        zero_point: receives the zero point (int32), if given. Integers only.
        minval: receives the minimum, if given. Integers only.
        running_min: running minimum before and after; needed unless ``update`` is ``LATEST``.
        running_max: running maximum, likewise.
        block_size: extent of a block along each axis; must divide the shape.
        scheme: a :class:`coreai_kernels.Scheme`.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        format: a :class:`coreai_kernels.Format`.
        use_minval: min-value formulation instead of zero point.
        update: a :class:`coreai_kernels.RangeUpdate`. ``MOVING_AVERAGE``: ``c * batch + (1 - c) * running``.
        has_running: whether the running range holds one already; if not it becomes the batch's.
        averaging_constant: ``c`` above.
        range_min: a fixed lower bound, at most 0, in place of the batch's minimum.
        range_max: a fixed upper bound, at least 0.
        scale_format: a :class:`coreai_kernels.ScaleFormat`; but for FLOAT32, integers need a symmetric range.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: block size, shapes or range do not fit, or a running range is missing.
        IndexError: a block is empty.
        TypeError: ``input`` is not floating point.
    """
    state = (scale, zero_point, minval, running_min, running_max)
    config = QuantConfig(
        block_size=block_size,
        scheme=scheme,
        format=format,
        quant_min=quant_min,
        quant_max=quant_max,
        use_minval=use_minval,
        update=update,
        averaging_constant=averaging_constant,
        range_min=range_min,
        range_max=range_max,
        scale_format=scale_format,
    )
    check(input, state, config)
    return apply(input, state, has_running, config)


def check(input: Tensor, state: tuple[Tensor | None, ...], config: QuantConfig) -> None:
    """Raise what :func:`observe_and_fake_quantize` raises for bad arguments, given as to :func:`apply`."""
    fmt = Format(config.format)
    checks.check_float_input("input", input)
    checks.check_range(fmt, config.quant_min, config.quant_max)
    checks.check_scale_format(config.scale_format, fmt, config.scheme, config.quant_min, config.quant_max)
    grid = checks.check_blocks("block_size", input, config.block_size)
    for name, value in zip(_STATE, state, strict=True):
        if value is not None and value.shape != grid:
            raise ValueError(
                f"{name} must have one value per block, shape {grid}; got shape {tuple(value.shape)}"
            )
    if config.update != RangeUpdate.LATEST and any(value is None for value in state[3:]):
        raise ValueError(f"update={RangeUpdate(config.update).name} needs running_min and running_max")
    low, high = config.range_min, config.range_max
    if (low is not None and low > 0) or (high is not None and high < 0):
        raise ValueError(f"the fixed range must contain 0; got [{low}, {high}]")


def apply(
    input: Tensor,
    state: tuple[Tensor | None, ...],
    has_running: bool,
    config: QuantConfig,
    packed_config: Tensor | None = None,
) -> Tensor:
    """:func:`observe_and_fake_quantize` without the argument checks, for callers that have made them.

    Args:
        input: the tensor.
        state: scale, zero point, minimum, running minimum, running maximum.
        has_running: whether the running range holds one already.
        config: the settings.
        packed_config: the same packed, for callers that keep it.
    """
    if not is_plain(input, state):
        return _with_converted_state(input, state, has_running, config)
    if not torch.compiler.is_compiling():
        args = (*state, has_running, config.packed() if packed_config is None else packed_config)
        return fake_quantize.straight_through(input, implementation("observe_and_fake_quantize_"), args)
    if backends.forced() == "reference":
        # Traced as it stands, with the configuration's entries as constants.
        return fake_quantize.straight_through(input, _reference_in_place, (*state, has_running, config))
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    if not is_exporting():
        operator = torch.ops.coreai_kernels.observe_and_fake_quantize_unpacked_
        fields = (*state, has_running, *config.arguments())
        if needs_grad:
            recompute_masks()
            return fake_quantize.StraightThrough.apply(input, operator, fields)  # type: ignore[no-any-return]
        return operator(input, *fields, False)[0]  # type: ignore[no-any-return]
    running = state[3:] if has_running else (None, None)
    output, _mask, *new = torch.ops.coreai_kernels.observe_and_fake_quantize(
        input, *running, *config.arguments(), needs_grad
    )
    for old, value in zip(state, new, strict=True):
        if old is not None:
            old.copy_(value.detach())
    return output  # type: ignore[no-any-return]


def is_plain(input: Tensor, state: tuple[Tensor | None, ...]) -> bool:
    """Whether the state, as far as given, has the dtypes and the layout that the kernels keep."""
    scale, minval = state[0], state[2]
    running_min = state[3] if len(state) > 3 else None
    return (
        scale.dtype == torch.float32  # type: ignore[union-attr]
        and (minval is None or minval.dtype == torch.float32)
        and (running_min is None or running_min.dtype == input.dtype)
        # `module.to(memory_format=torch.channels_last)` gives buffers of four axes other strides, too.
        and all(value is None or value.is_contiguous() for value in state)
    )


def _with_converted_state(
    input: Tensor, state: tuple[Tensor | None, ...], has_running: bool, config: QuantConfig
) -> Tensor:
    """The step for state of other dtypes or strides than kernels keep, in one more pass over the input."""
    scale, zero_point, minval = observe(input, state, has_running, config)
    return fake_quantize.apply(
        input,
        scale,
        *config.parameters(zero_point, minval),
        config.block_size,
        config.format,
        config.quant_min,
        config.quant_max,
    )


def observe(
    input: Tensor, state: tuple[Tensor | None, ...], has_running: bool, config: QuantConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`apply` does to the state, without the simulation. The new scale, zero point and minimum."""
    low, high = implementation("observe_range")(input.detach(), config.block_size)
    running_min, running_max = state[3:] if has_running else (None, None)
    low, high = next_range(low, high, running_min, running_max, config)
    scale, zero_point, minval = implementation("choose_qparams")(
        low, high, config.scheme, config.format, config.quant_min, config.quant_max, config.scale_format
    )
    for old, value in zip(state, (scale, zero_point, minval, low, high), strict=True):
        if old is not None:
            old.copy_(value)
    return scale, zero_point, minval
