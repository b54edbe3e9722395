"""One training step of a fake quantizer: observe, update the range, choose parameters, fake-quantize."""

import torch
from torch import Tensor

from coreai_kernels.reference import fake_quantize
from coreai_kernels.reference.observe_range import observe_range
from coreai_kernels.reference.qparams import choose_qparams, update_range
from coreai_kernels.types import Format, RangeUpdate

__all__ = ["constant_like", "observe_and_fake_quantize"]


def observe_and_fake_quantize(
    input: Tensor,
    running_min: Tensor | None,
    running_max: Tensor | None,
    block_size: tuple[int, ...],
    scheme: int,
    format: int,
    quant_min: float,
    quant_max: float,
    use_minval: bool,
    update: int,
    averaging_constant: float,
    range_min: float | None,
    range_max: float | None,
    power_of_two_scale: bool,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, packed mask, scale, zero point, minimum, and the new running range.

    ``running_min`` and ``running_max`` are the running range before this step, ``None`` at the first.
    ``use_minval`` selects the min-value formulation. A given ``range_min`` (at most 0) or ``range_max`` (at
    least 0) replaces the batch's bound on that side, in the input's dtype.
    """
    low, high = observe_range(input, block_size)
    low, high = low.clamp(max=0.0) + 0.0, high.clamp(min=0.0) + 0.0
    if range_min is not None:
        low = constant_like(low, range_min)
    if range_max is not None:
        high = constant_like(high, range_max)
    if running_min is not None and running_max is not None and update != RangeUpdate.LATEST:
        low, high = update_range(low, high, running_min, running_max, update, averaging_constant)
    scale, zero_point, minval = choose_qparams(
        low, high, scheme, format, quant_min, quant_max, power_of_two_scale
    )
    is_int = format == Format.INT
    output, mask = fake_quantize.forward(
        input,
        scale,
        zero_point if is_int and not use_minval else None,
        minval if is_int and use_minval else None,
        block_size,
        format,
        quant_min,
        quant_max,
        with_mask,
    )
    return output, mask, scale, zero_point, minval, low, high


def constant_like(bound: Tensor, value: float) -> Tensor:
    """``value`` as float32 arithmetic sees it, in the dtype of ``bound``."""
    return torch.full_like(bound, value, dtype=torch.float32).to(bound.dtype)
