"""The product of a weight and its mask."""

import torch
from torch import Tensor

__all__ = ["apply_mask"]


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask`` in the weight's memory format. A product: NaN and inf behave as IEEE 754 says."""
    return torch.mul(weight, mask, out=torch.empty_like(weight))
