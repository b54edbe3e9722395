"""``apply_mask``: the product of a weight and its mask."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels import backends
from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference.apply_mask import apply_mask as reference
from coreai_kernels.triton import registry as triton

__all__ = ["apply_mask"]

define(
    "apply_mask",
    "(Tensor weight, Tensor mask) -> Tensor",
    reference=reference,
    fake=lambda weight, mask: torch.empty_like(weight),
    triton=triton.get("apply_mask"),
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    # The mask itself, not its bits: its owner keeps it anyway, so it costs no memory, and the gradient is
    # right for values other than 0 and 1.
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (mask,) = ctx.saved_tensors
    return implementation("apply_mask")(grad, mask), None


torch.library.register_autograd("coreai_kernels::apply_mask", _backward, setup_context=_setup_context)


class _Masked(torch.autograd.Function):
    """Eager mode's gradient around the operator of a large tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return implementation("apply_mask")(weight, mask)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _backward(ctx, grad)


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask``, with the gradient ``grad * mask`` to the weight and none to the mask.

    Backward keeps the mask, which its owner keeps anyway, and nothing else.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor of any shape and strides.
        mask: tensor of the weight's shape, on its device; another dtype is converted to the weight's.

    Returns:
        Tensor of the weight's shape, dtype and memory format.

    Raises:
        ValueError: shape or device of the mask differ from the weight's.
        TypeError: ``weight`` is not floating point.
    """
    checks.check_float_input("weight", weight)
    if mask.shape != weight.shape:
        raise ValueError(f"mask must have the weight's shape {tuple(weight.shape)}; got {tuple(mask.shape)}")
    if mask.device != weight.device:
        raise ValueError(f"mask must be on the weight's device {weight.device}; got {mask.device}")
    return apply(weight, mask)


def apply(weight: Tensor, mask: Tensor) -> Tensor:
    """:func:`apply_mask` without the argument checks, for callers that have made them."""
    if mask.dtype != weight.dtype:
        mask = mask.to(weight.dtype)
    mask = mask.detach()
    if backends.forced() is None:
        return weight * mask
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Masked.apply(weight, mask)  # type: ignore[no-any-return]
    return implementation("apply_mask")(weight, mask)  # type: ignore[no-any-return]
