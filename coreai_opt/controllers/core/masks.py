"""Masked weights: parametrizations that hold a mask, and what is counted of them."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import coreai_kernels

__all__ = [
    "BinaryMask",
    "bake",
    "install",
    "installed",
    "keep_counts",
    "kept_per_mask",
    "original",
]

Link = TypeVar("Link", bound=nn.Module)


class BinaryMask(nn.Module):
    """Multiplies a weight by a mask of zeros and ones. Gradients of masked elements are zero.

    Args:
        weight: gives the mask its shape, dtype, memory format and device; all ones at first.
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, requires_grad=False))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        return coreai_kernels.apply_mask(weight, self.mask)


def install(layer: nn.Module, parametrization: nn.Module, name: str = "weight") -> None:
    """Put a parametrization on a layer's weight, after those that are there."""
    parametrize.register_parametrization(layer, name, parametrization)


def installed(model: nn.Module, kind: type[Link], name: str = "weight") -> dict[str, Link]:
    """The parametrizations of type ``kind`` in a model, by the name of their layer."""
    found = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, name):
            for link in module.parametrizations[name]:  # type: ignore[index, union-attr]
                if isinstance(link, kind):
                    found[path] = link
    return found


def original(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """The parameter itself, before all parametrizations."""
    if parametrize.is_parametrized(layer, name):
        return layer.parametrizations[name].original  # type: ignore[index, union-attr, return-value]
    return getattr(layer, name)  # type: ignore[no-any-return]


def bake(model: nn.Module, types: tuple[type[nn.Module], ...], name: str = "weight") -> None:
    """Remove the parametrizations of ``types``, leaving in the weights what they, and those before, made.

    Parametrizations of other kinds that come later stay. The masked elements become zeros.
    """
    for module in model.modules():
        if not parametrize.is_parametrized(module, name):
            continue
        chain: Any = module.parametrizations[name]  # type: ignore[index, union-attr]
        links = list(chain)
        last = max((index for index, link in enumerate(links) if isinstance(link, types)), default=None)
        if last is None:
            continue
        with torch.no_grad():
            value = chain.original
            for link in links[: last + 1]:
                value = link(value)
            chain.original.copy_(value)
        rest = links[last + 1 :]
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for link in rest:
            parametrize.register_parametrization(module, name, link)


def kept_per_mask(masks: Sequence[Tensor]) -> list[int]:
    """Kept elements of each mask, in one transfer from the device."""
    if not masks:
        return []
    return [int(count) for count in torch.stack([mask.count_nonzero() for mask in masks]).tolist()]


def keep_counts(numels: Iterable[int], level: float) -> list[int]:
    """Elements to keep of tensors of ``numels`` elements: all but ``round(level * numel)``."""
    return [numel - round(level * numel) for numel in numels]
