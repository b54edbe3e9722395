"""One training step of a fake quantizer: observe, update the range, choose parameters, fake-quantize."""

import torch
from torch import Tensor

from coreai_kernels.quant_config import QuantConfig
from coreai_kernels.reference import fake_quantize
from coreai_kernels.reference.observe_range import observe_range
from coreai_kernels.reference.qparams import choose_qparams, update_range
from coreai_kernels.types import RangeUpdate

__all__ = ["next_range", "observe_and_fake_quantize"]


def observe_and_fake_quantize(
    input: Tensor,
    running_min: Tensor | None,
    running_max: Tensor | None,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, packed mask, scale, zero point, minimum, and the new running range.

    ``running_min`` and ``running_max`` are the running range before this step, ``None`` at the first.
    """
    low, high = observe_range(input, config.block_size)
    low, high = next_range(low, high, running_min, running_max, config)
    scale, zero_point, minval = choose_qparams(
        low, high, config.scheme, config.format, config.quant_min, config.quant_max, config.scale_format
    )
    output, mask = fake_quantize.forward(
        input,
        scale,
        *config.parameters(zero_point, minval),
        config.block_size,
        config.format,
        config.quant_min,
        config.quant_max,
        with_mask,
    )
    return output, mask, scale, zero_point, minval, low, high


def next_range(
    low: Tensor, high: Tensor, running_min: Tensor | None, running_max: Tensor | None, config: QuantConfig
) -> tuple[Tensor, Tensor]:
    """The range that the parameters follow from, after a batch with minima ``low`` and maxima ``high``.

    It contains zero. A given ``range_min`` (at most 0) or ``range_max`` (at least 0) replaces the batch's
    bound on that side, in the input's dtype; then the running range counts, if there is one.
    """
    low, high = low.clamp(max=0.0) + 0.0, high.clamp(min=0.0) + 0.0
    if config.range_min is not None:
        low = _constant_like(low, config.range_min)
    if config.range_max is not None:
        high = _constant_like(high, config.range_max)
    if running_min is None or running_max is None or config.update == RangeUpdate.LATEST:
        return low, high
    return update_range(low, high, running_min, running_max, config.update, config.averaging_constant)


def _constant_like(bound: Tensor, value: float) -> Tensor:
    """``value`` as float32 arithmetic sees it, in the dtype of ``bound``."""
    return torch.full_like(bound, value, dtype=torch.float32).to(bound.dtype)
