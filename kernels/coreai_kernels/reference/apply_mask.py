"""The product of a weight and its mask."""

from torch import Tensor

from coreai_kernels.reference.layout import in_format_of

__all__ = ["apply_mask"]


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask`` in the weight's memory format. A product: NaN and inf behave as IEEE 754 says."""
    return in_format_of(weight, weight * mask)
