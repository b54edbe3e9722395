"""Masks that follow importance scores, their loss, and their structured resolution."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import coreai_kernels
from coreai_opt._sharding.layout import whole
from coreai_opt.controllers.core.api import CompressionLoss
from coreai_opt.controllers.core.gradients import scaled_gradient, with_zero_gradients
from coreai_opt.controllers.structures.units import Structure

__all__ = ["MovementMask", "MovementSparsityLoss", "kept_units", "resolve"]


class _Threshold(torch.autograd.Function):
    """``1[scores > threshold]``, whose gradient passes to the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class MovementMask(nn.Module):
    """Masks a weight by importance scores that are trained with it.

    Args:
        weight: of a linear layer; gives the scores their device. They begin at zero.
        factors: rows and columns of the weight that share a score; they divide its shape.
        gradient_factor: on the gradient of the scores.
    """

    threshold: Tensor
    fixed_mask: Tensor

    def __init__(
        self, weight: Tensor, factors: tuple[int, int] = (1, 1), gradient_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.factors = factors
        self.gradient_factor = gradient_factor
        self.shape = weight.shape
        rows, columns = factors
        scores = torch.zeros(weight.shape[0] // rows, weight.shape[1] // columns, device=weight.device)
        self.scores = nn.Parameter(scores)
        self.register_buffer("threshold", torch.full((), -1.0, device=weight.device))
        self.register_buffer("fixed_mask", torch.ones_like(weight, requires_grad=False))
        self.frozen = False

    def _spread(self, mask: Tensor) -> Tensor:
        """One value a score to one value an element."""
        if self.factors == (1, 1):
            return mask
        (rows, columns), (down, across) = mask.shape, self.factors
        return mask[:, None, :, None].expand(rows, down, columns, across).reshape(self.shape)

    def mask(self) -> Tensor:
        """The current mask, of the weight's shape."""
        return self.fixed_mask if self.frozen else self._spread(whole(self.scores.detach()) > self.threshold)

    def expected_count(self) -> Tensor:
        """Sum of ``sigmoid(scores)`` over the weight's elements."""
        return self.trained_scores().sigmoid().sum() * math.prod(self.factors)

    def trained_scores(self) -> Tensor:
        """The scores, with their scaled gradient."""
        return scaled_gradient(whole(self.scores), self.gradient_factor)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        if self.frozen:
            masked = coreai_kernels.apply_mask(weight, self.fixed_mask)
            return with_zero_gradients(masked, self.scores) if self.training else masked
        mask = _Threshold.apply(self.trained_scores(), self.threshold)  # type: ignore[no-untyped-call]
        return weight * self._spread(mask).to(weight.dtype)


class MovementSparsityLoss(CompressionLoss):
    """``factor * share of the way * mean of sigmoid(scores)`` over the weights' elements.

    Zero before warm-up and once frozen.
    """

    def __init__(self, masks: list[MovementMask], factor: float) -> None:
        self._masks = masks
        self._factor = factor
        self.progress = 0.0
        self.disabled = False

    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradient to the scores."""
        device = self._masks[0].scores.device
        if self.disabled or self.progress <= 0:
            return torch.zeros((), device=device)
        total = torch.zeros((), device=device)
        for mask in self._masks:
            total = total + mask.expected_count()
        return self._factor * self.progress * total / sum(mask.shape.numel() for mask in self._masks)


def kept_units(structure: Structure, masks: Mapping[str, Tensor]) -> Tensor:
    """Which units of a structure some of its layers keep an element of: bool, one a unit."""
    rows = [masks[name].reshape(structure.units, -1).any(1) for name in structure.rows]
    columns = [masks[name].any(0).reshape(structure.units, -1).any(1) for name in structure.columns]
    return torch.stack([*rows, *columns]).any(0)


def resolve(structures: Sequence[Structure], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep or drop each unit whole, in all of its layers.

    A unit that no layer keeps anything of is dropped. Of the others all elements are kept, those that were
    masked, too: zeros inside a unit save nothing ("filled" in Lagunas et al., arXiv 2109.04838). Layers
    without structures keep their masks.
    """
    resolved = dict(masks)
    for name in {name for structure in structures for name in (*structure.rows, *structure.columns)}:
        resolved[name] = torch.ones_like(masks[name])
    for structure in structures:
        kept = kept_units(structure, masks)
        for name in structure.rows:
            resolved[name] = resolved[name] & _spread_units(kept, resolved[name].shape[0])[:, None]
        for name in structure.columns:
            resolved[name] = resolved[name] & _spread_units(kept, resolved[name].shape[1])
    return resolved


def _spread_units(kept: Tensor, size: int) -> Tensor:
    return kept[:, None].expand(-1, size // kept.numel()).reshape(size)
