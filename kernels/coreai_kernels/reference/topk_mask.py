"""Which elements have the largest magnitudes, of one tensor or of several together."""

import functools

import torch
from torch import Tensor

from coreai_kernels.reference.layout import in_format_of
from coreai_kernels.reference.magnitude import magnitude_keys

__all__ = ["largest", "topk_mask", "topk_masks"]


def largest(keys: Tensor, num_keep: int) -> Tensor:
    """Which of the keys, a 1-D tensor of integers, are the ``num_keep`` largest; the lower index first."""
    order = keys.sort(descending=True, stable=True).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(0, order[:num_keep], True)


def topk_mask(weight: Tensor, num_keep: int) -> Tensor:
    """One where ``weight`` is among the ``num_keep`` largest magnitudes, else zero; the lower index first."""
    return topk_masks([weight], num_keep)[0]


def topk_masks(weights: list[Tensor], num_keep: int) -> list[Tensor]:
    """:func:`topk_mask` of all elements together, numbered through the list and in each tensor row by row."""
    if not weights:
        return []
    # Every value of the narrower types is one of the wider type, in the same order.
    common = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
    keys = torch.cat([magnitude_keys(weight.to(common)).reshape(-1) for weight in weights])
    parts = largest(keys, num_keep).split([weight.numel() for weight in weights])
    return [
        in_format_of(weight, part.view(weight.shape)) for weight, part in zip(weights, parts, strict=True)
    ]
