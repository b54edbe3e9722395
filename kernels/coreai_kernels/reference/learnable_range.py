"""The gradient of quantization to a range that is learned: the definition."""

import torch
from torch import Tensor

from coreai_kernels.reference.layout import in_format_of, per_block, split_blocks
from coreai_kernels.wide import widened

__all__ = ["backward", "terms"]


def terms(
    input: Tensor,
    low: Tensor | None,
    range: Tensor,
    block_size: list[int],
    level_low: float,
    level_high: float,
) -> tuple[Tensor, Tensor]:
    """Per element, float32: whether it lies inside, and the derivative of its output to the range.

    With ``step = range / level_high`` and ``q = round((x - low) / step)``: inside, where ``level_low <= q <=
    level_high``, it is ``(y - x) / range``; above 1; below, and for NaN, ``level_low / level_high``.
    """
    sizes = tuple(block_size)
    x = input.float()
    width = per_block(range.float(), x, sizes)
    step = per_block(range.float() / level_high, x, sizes)
    offset = 0.0 if low is None else per_block(low.float(), x, sizes)
    q = torch.round((x - offset) / step)
    clamped = torch.where(q > level_low, q, level_low)
    clamped = torch.where(clamped < level_high, clamped, level_high)
    inside = clamped == q
    y = clamped * step + offset
    # On the device: what the host makes it would have to hand over.
    ratio = x.new_full((), level_low) / x.new_full((), level_high)
    outside = torch.where(clamped == level_high, 1.0, ratio)
    return inside, torch.where(inside, (y - x) / width, outside)


def backward(
    grad: Tensor,
    input: Tensor,
    low: Tensor | None,
    range: Tensor,
    block_size: list[int],
    level_low: float,
    level_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to the input, to ``low`` (zeros without one) and to ``range``.

    The first is ``grad`` inside and ``grad * 0`` outside. The others sum float32 products over each block, in
    float64: the order of the sum is free, so backends agree within a few units in the last place of the sum
    of magnitudes, and each with itself bit for bit. (A Mac's GPU has float32 only: to 1e-5 of that sum.)
    """
    inside, slope = terms(input, low, range, block_size, level_low, level_high)
    g = grad.float()
    to_input = in_format_of(input, g * inside)

    def summed(values: Tensor) -> Tensor:
        blocks, axes = split_blocks(widened(values), tuple(block_size))
        return (blocks.sum(axes) if axes else blocks).float().reshape(range.shape)

    to_low = torch.zeros_like(range) if low is None else summed(torch.where(inside, 0.0, g))
    return to_input, to_low, summed(g * slope)
