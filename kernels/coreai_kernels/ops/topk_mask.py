"""``topk_mask`` and ``topk_masks``: keep the largest magnitudes of a tensor, or of several together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import topk_mask as reference

__all__ = ["topk_mask", "topk_masks"]

define(
    "topk_mask",
    "(Tensor weight, int num_keep) -> Tensor",
    reference=reference.topk_mask,
    fake=lambda weight, num_keep: torch.empty_like(weight),
)
define(
    "topk_masks",
    "(Tensor[] weights, int num_keep) -> Tensor[]",
    reference=reference.topk_masks,
    fake=lambda weights, num_keep: [torch.empty_like(weight) for weight in weights],
)


def topk_mask(weight: Tensor, num_keep: int) -> Tensor:
    """Mask that keeps exactly ``num_keep`` elements: those of largest magnitude.

    Of equal magnitudes the lowest index in row-major order is kept first, whatever the strides. ``-0.0``
    equals ``0.0``, subnormals are told apart, and NaN ranks above infinity. float64 is compared as such.
    Nothing is sorted, and no tensor of indices is made. Not differentiable.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of any shape and strides; may be empty.
        num_keep: number of ones, 0 to ``weight.numel()``.

    Returns:
        Ones and zeros in the weight's shape, dtype and memory format.

    Raises:
        ValueError: ``num_keep`` is out of range.
        TypeError: ``weight`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    checks.check_num_keep(num_keep, weight.numel(), "elements")
    return implementation("topk_mask")(weight.detach(), num_keep)  # type: ignore[no-any-return]


def topk_masks(weights: Sequence[Tensor], num_keep: int) -> list[Tensor]:
    """Masks that keep ``num_keep`` elements of all tensors together: one threshold for a whole model.

    As :func:`topk_mask` of the tensors joined in the order of the list; that order also breaks ties. Values
    of different dtypes are compared as numbers.

    Args:
        weights: tensors as :func:`topk_mask` takes them, on one device.
        num_keep: number of ones in all masks, 0 to the number of all elements.

    Returns:
        One mask for each weight.

    Raises:
        ValueError: ``num_keep`` is out of range, or the tensors are on different devices.
        TypeError: a weight is not floating point.
    """
    for i, weight in enumerate(weights):
        checks.check_float_input(f"weights[{i}]", weight)
        if weight.device != weights[0].device:
            raise ValueError(
                f"weights must be on one device: weights[0] is on {weights[0].device}, "
                f"weights[{i}] on {weight.device}"
            )
    checks.check_num_keep(num_keep, sum(weight.numel() for weight in weights), "elements")
    return implementation("topk_masks")([weight.detach() for weight in weights], num_keep)  # type: ignore[no-any-return]
