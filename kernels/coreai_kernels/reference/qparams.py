"""From a range to scale, zero point and minimum; and how a batch's range enters the running one."""

import torch
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat, largest_exponent
from coreai_kernels.reference.rounding import round_to_format
from coreai_kernels.types import RangeUpdate, Scheme

__all__ = ["choose_qparams", "tensor_scale", "to_int32", "update_range"]

SMALLEST_SCALE = ScaleFormat.FLOAT32.facts.smallest
INT32_MIN = -(2**31)


class _Arithmetic:
    """float32 arithmetic with each result rounded to ``dtype``, as a chain of torch operators does it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = torch.float32 if dtype == torch.float64 else dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.dtype == torch.float32 else x.to(self.dtype).float()


def update_range(
    low: Tensor,
    high: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    update: int,
    averaging_constant: float,
) -> tuple[Tensor, Tensor]:
    """New running minimum and maximum, in the dtype of ``low`` and ``high``."""
    if update == RangeUpdate.GLOBAL_MINMAX:
        return torch.minimum(low, running_min.to(low.dtype)), torch.maximum(high, running_max.to(high.dtype))

    def average(batch: Tensor, running: Tensor) -> Tensor:
        rounded = _Arithmetic(batch.dtype)
        # Host scalars enter float32 arithmetic as float32, whatever the tensor's dtype.
        new, old = batch.float() * averaging_constant, running.float() * (1.0 - averaging_constant)
        return (rounded(new) + rounded(old)).to(batch.dtype)

    return average(low, running_min), average(high, running_max)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    scheme: int,
    format: int,
    quant_min: float,
    quant_max: float,
    scale_format: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (float32), zero point (int32) and minimum (float32), all of the shape of ``min_val``.

    The arithmetic is that of the wider dtype of the two bounds, each step rounded to it. For floating-point
    formats zero point and minimum carry no information and are zero. Integers with power-of-two scales have
    zero point 0 and minimum ``-amax`` (MXINT8 for int8).
    """
    rounded = _Arithmetic(torch.promote_types(min_val.dtype, max_val.dtype))
    low = min_val.float().clamp(max=0.0) + 0.0
    high = max_val.float().clamp(min=0.0) + 0.0
    amax = torch.maximum(-low, high) + 0.0
    fmt = Format(format)
    if scale_format == ScaleFormat.E8M0:
        scale = _power_of_two_scale(amax, largest_exponent(format, quant_max))
        minval = -amax if fmt == Format.INT else torch.zeros_like(scale)
        return scale, torch.zeros_like(scale, dtype=torch.int32), minval
    if scale_format == ScaleFormat.E4M3:
        scale = _two_level_scale(amax, tensor_scale(min_val, max_val, quant_max), quant_max)
        return scale, torch.zeros_like(scale, dtype=torch.int32), torch.zeros_like(scale)
    if fmt == Format.INT and scheme == Scheme.ASYMMETRIC:
        scale = rounded(_divide(rounded(high - low), quant_max - quant_min)).clamp(min=SMALLEST_SCALE)
        zero_point = rounded(quant_min - torch.round(rounded(low / scale))).clamp(quant_min, quant_max)
        return scale, to_int32(zero_point), low
    scale = rounded(_divide(amax, (quant_max - quant_min) / 2)).clamp(min=SMALLEST_SCALE)
    if fmt != Format.INT:
        return scale, torch.zeros_like(scale, dtype=torch.int32), torch.zeros_like(scale)
    zero_point = torch.full_like(scale, int((quant_min + quant_max + 1) / 2), dtype=torch.int32)
    return scale, zero_point, -amax


def _divide(x: Tensor, divisor: float) -> Tensor:
    """IEEE quotient: CUDA turns the division by a host scalar into a product with its reciprocal."""
    return x / torch.full_like(x, divisor)


def to_int32(x: Tensor) -> Tensor:
    """Truncate; NaN becomes the smallest integer, as on x86, where C++ leaves it undefined."""
    return torch.where(x.isnan(), INT32_MIN, x.nan_to_num().to(torch.int32)).to(torch.int32)


def _power_of_two_scale(amax: Tensor, largest: int) -> Tensor:
    """e8m0 scale, floor mode (OCP microscaling specification 1.0, section 6.3)."""
    exponent = ((amax.view(torch.int32) >> 23) & 0xFF) - 127 - largest
    biased = exponent.clamp(-127, 128) + 127
    return (biased << 23).view(torch.float32).clamp(min=ScaleFormat.E8M0.facts.smallest)


def tensor_scale(min_val: Tensor, max_val: Tensor, quant_max: float) -> Tensor:
    """The scale, without axes, that the blocks of one tensor share in two-level scales; float32.

    With it the block of the largest element has the largest e4m3 scale, 448.
    """
    high = torch.maximum(-min_val.float(), max_val.float()).clamp(min=0.0)
    amax = high.amax() if high.numel() else high.new_zeros(())
    largest = Format.E4M3.facts.largest * quant_max
    return _divide(amax, largest).clamp(min=ScaleFormat.E4M3.facts.smallest_of_tensor)


def _two_level_scale(amax: Tensor, of_tensor: Tensor, quant_max: float) -> Tensor:
    """Scales of NVIDIA's NVFP4: an e4m3 number for each block times a float32 one for the tensor.

    ::

        tensor scale = largest amax / (448 * quant_max)
        block scale  = e4m3((amax / quant_max) / tensor scale)

    For e2m1 values ``quant_max`` is 6. The formulas are those of NVIDIA, "Pretraining Large Language Models
    with NVFP4" (arXiv 2509.25149), where the reciprocal of the tensor's scale is the global encode scale.
    Values are divided by the product, so a block's scale is no smaller than the smallest positive e4m3.
    """
    largest, smallest = Format.E4M3.facts.largest, ScaleFormat.E4M3.facts.smallest
    of_block = (_divide(amax, quant_max) / of_tensor).clamp(smallest, largest)
    return round_to_format(of_block, Format.E4M3) * of_tensor
