"""The division by which a convolution with a scaled weight gives what it would have given."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["unscale"]


def unscale(output: Tensor, scale: Tensor) -> Tensor:
    """``output / scale``, bit for bit, and its gradients, in about half of the passes over memory.

    The derivative by ``scale`` is the sum of ``-grad * ((output / scale) / scale)``, for which torch divides
    twice, negates and multiplies, each into fresh memory of the output's size. The quotient is known from the
    forward, and kept in the place of ``output``; the sign is the sum's.

    Args:
        output: of a convolution, ``(batch, channels, *spatial)``.
        scale: of each channel, ``(1, channels, 1, ...)``.
    """
    if output.requires_grad or scale.requires_grad:
        return _Unscale.apply(output, scale)  # type: ignore[no-any-return, no-untyped-call]
    return output / scale


class _Unscale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, scale: Tensor) -> Tensor:
        quotient = output / scale
        ctx.save_for_backward(quotient, scale)
        ctx.dtype = output.dtype
        return quotient

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        quotient, scale = ctx.saved_tensors
        of_output, of_scale = ctx.needs_input_grad
        grad_output = (grad / scale).to(ctx.dtype) if of_output else None
        grad_scale = None
        if of_scale:
            axes = [0, *range(2, grad.dim())]
            # Zero minus: a sum of negatives is never -0.0.
            total = (quotient / scale).mul_(grad).sum(axes, keepdim=True)
            grad_scale = (0.0 - total).to(scale.dtype)
        return grad_output, grad_scale
