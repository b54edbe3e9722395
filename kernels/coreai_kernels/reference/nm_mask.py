"""N:M sparsity: the largest n of every m neighbours."""

import torch
from torch import Tensor

from coreai_kernels.reference.layout import in_format_of
from coreai_kernels.reference.magnitude import magnitude_keys

__all__ = ["nm_mask"]


def nm_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """One where an element is among the ``n`` largest magnitudes of its group; lower index first."""
    if weight.numel() == 0:
        return torch.empty_like(weight)
    groups = magnitude_keys(weight).movedim(axis, -1).unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return in_format_of(weight, keep.flatten(-2).movedim(-1, axis))
