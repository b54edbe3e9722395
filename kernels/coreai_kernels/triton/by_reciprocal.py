"""Fake quantization by the reciprocal of a scale, of other operations' kernels.

``x * (1 / scale)`` with a scale of one is rounded, clipped and masked as torchao does.
"""

import torch
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.reference import by_reciprocal as reference
from coreai_kernels.triton.bits import unpack_bits
from coreai_kernels.triton.fake_quantize import fake_quantize_forward
from coreai_kernels.triton.observe_range import observe_range

__all__ = ["fake_quantize_by_reciprocal_", "fake_quantize_by_reciprocal_backward"]


def fake_quantize_by_reciprocal_(
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
    """See the reference."""
    blocks = input.reshape(-1, run)
    if chooses:
        ranges = observe_range(blocks, [1, run])
        reference.choose_(scale, zero_point, ranges, is_symmetric, quant_min, quant_max, eps)
    factor, points = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    output, mask = fake_quantize_forward(
        blocks * (1.0 / factor),
        torch.ones_like(factor),
        points,
        None,
        [1, run],
        int(Format.INT),
        quant_min,
        quant_max,
        with_mask,
    )
    return output.mul_(factor).view(input.shape), mask


def fake_quantize_by_reciprocal_backward(grad: Tensor, mask: Tensor, scale: Tensor, run: int) -> Tensor:
    """See the reference."""
    factor = scale.reshape(-1, 1)
    blocks = grad.reshape(-1, run) * factor
    keep = unpack_bits(mask, 1, grad.numel(), True)
    blocks.view(torch.int32).bitwise_and_(keep.to(torch.int32).view(blocks.shape))
    return blocks.mul_(1.0 / factor).view(grad.shape)
