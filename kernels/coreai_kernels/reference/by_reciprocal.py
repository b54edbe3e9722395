"""Fake quantization by the reciprocal of a scale, as torchao's quantization-aware training does it."""

import torch
from torch import Tensor

from coreai_kernels.reference.bits import pack_mask, unpack_mask

__all__ = ["backward", "choose", "forward_"]


def choose(
    low: Tensor, high: Tensor, is_symmetric: bool, quant_min: float, quant_max: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of blocks with these ranges: torchao's ``choose_qparams_affine``."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width = quant_max - quant_min
    if is_symmetric:
        scale = (torch.maximum(-low, high) / (width / 2)).clamp(min=eps)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / width).clamp(min=eps)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


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
        found = choose(*blocks.aminmax(dim=1), is_symmetric, quant_min, quant_max, eps)
        for parameter, values in zip((scale, zero_point), found, strict=True):
            parameter.copy_(values.view(parameter.shape))
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
