"""Weights that a model transposes to multiply by them: linear layers that are written ``x @ weight.T``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_product", "is_transposition"]

_TRANSPOSITIONS = {
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    Tensor.t,
    Tensor.transpose,
    torch.t,
    torch.transpose,
}
_PRODUCTS = {torch.matmul, Tensor.matmul}


def is_transposition(function: Callable[..., Any]) -> bool:
    """Whether the function swaps the axes of a matrix."""
    return function in _TRANSPOSITIONS


def is_product(function: Callable[..., Any]) -> bool:
    """Whether the function's second operand, a matrix, is multiplied from the right."""
    return function in _PRODUCTS
