"""Fake quantization by the reciprocal of a scale, as torchao's quantization-aware training does it."""

import torch
from torch import Tensor

from coreai_kernels.reference.bits import pack_mask, unpack_mask
from coreai_kernels.reference.qparams import to_int32

__all__ = ["backward", "choose_", "forward_"]


def choose_(
    scale: Tensor,
    zero_point: Tensor,
    ranges: tuple[Tensor, Tensor],
    is_symmetric: bool,
    quant_min: float,
    quant_max: float,
    eps: float,
) -> None:
    """Write scale and zero point of blocks with these ranges: torchao's ``choose_qparams_affine``."""
    low, high = ranges
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width = quant_max - quant_min
    if is_symmetric:
        scale.copy_((torch.maximum(-low, high) / (width / 2)).clamp(min=eps).view(scale.shape))
        zero_point.zero_()
        return
    steps = ((high - low) / width).clamp(min=eps)
    scale.copy_(steps.view(scale.shape))
    offset = (quant_min - torch.round(low / steps)).clamp(quant_min, quant_max)
    zero_point.copy_(to_int32(offset).view(zero_point.shape))


def forward_(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    run: int,
    chooses: bool,
    is_symmetric: bool,
    quant_min: float,
    quant_max: float,
    eps: float,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """The output and the packed mask, which is empty if not wanted."""
    blocks = input.reshape(-1, run)
    if chooses:
        choose_(scale, zero_point, blocks.aminmax(dim=1), is_symmetric, quant_min, quant_max, eps)
    factor, offset = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    q = torch.round(blocks * (1.0 / factor)) + offset
    output = ((q.clamp(quant_min, quant_max) - offset) * factor).view(input.shape)
    inside = (q >= quant_min) & (q <= quant_max) if with_mask else q.new_empty(0, dtype=torch.bool)
    return output, pack_mask(inside)


def backward(grad: Tensor, mask: Tensor, scale: Tensor, run: int) -> Tensor:
    """``grad * scale * (1 / scale)`` inside, rounded twice; zero outside."""
    factor = scale.reshape(-1, 1)
    # Not a product with the mask, which has a sign where torchao's zero has none.
    outside = ~unpack_mask(mask, grad.numel()).view(-1, run)
    blocks = (grad.reshape(-1, run) * factor).masked_fill(outside, 0.0)
    return (blocks * (1.0 / factor)).view(grad.shape)
