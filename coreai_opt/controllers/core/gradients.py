"""Gradients of the parameters that compression adds."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["scaled_gradient", "with_zero_gradients"]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


def scaled_gradient(tensor: Tensor, factor: float) -> Tensor:
    """``tensor``, whose gradient is multiplied by ``factor``. A hook would not be there in a copy."""
    return tensor if factor == 1 else _Scaled.apply(tensor, factor)  # type: ignore[no-any-return, no-untyped-call]


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(unused)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def with_zero_gradients(tensor: Tensor, *unused: Tensor) -> Tensor:
    """``tensor``, and zeros as gradients for parameters that it does not depend on any more.

    DistributedDataParallel waits for the gradient of every parameter.
    """
    for parameter in unused:
        tensor = _ZeroGradient.apply(tensor, parameter)  # type: ignore[no-untyped-call]
    return tensor
