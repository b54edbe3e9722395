"""Masked weights: parametrizations that hold a mask, and what is counted of them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import coreai_kernels
from coreai_opt._sharding.layout import whole
from coreai_opt.controllers.core.lowering import LoweredWeight
from coreai_opt.controllers.core.owners import Owners, computed_by
from coreai_opt.export.records import Sparse
from coreai_opt.export.torch import give_own_class

__all__ = [
    "BinaryMask",
    "bake",
    "install",
    "installed",
    "keep_counts",
    "kept_per_mask",
    "original",
    "sparse_weights",
    "value_before",
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


def install(
    layer: nn.Module, parametrization: nn.Module, owners: Owners | None = None, name: str = "weight"
) -> None:
    """Put a parametrization on a layer's tensor, after those that are there.

    Args:
        layer: holds the tensor.
        parametrization: what computes the tensor's value from now on.
        owners: of the model: a tensor that several modules share is parametrized in all of them.
        name: the layer's attribute.

    Raises:
        ValueError: something else computes the tensor already.
    """
    link: Any = parametrization
    link._of_a_controller = True
    for path, module, attribute in [(None, layer, name)] if owners is None else owners.of(layer, name):
        if module is layer:
            link._layer_name = path
        if (other := computed_by(module, attribute)) is not None:
            raise ValueError(f"the {attribute} of {module} is computed by {other}; remove that first")
        parametrize.register_parametrization(module, attribute, parametrization)


def installed(model: nn.Module, kind: type[Link], name: str = "weight") -> dict[str, Link]:
    """The parametrizations of type ``kind`` in a model, by the name of the layer they were meant for."""
    found: dict[str, Link] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, name):
            for link in module.parametrizations[name]:  # type: ignore[index, union-attr]
                if isinstance(link, kind):
                    found[getattr(link, "_layer_name", None) or path] = link
    return found


def original(layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """The parameter itself, before all parametrizations."""
    if parametrize.is_parametrized(layer, name):
        return layer.parametrizations[name].original  # type: ignore[index, union-attr, return-value]
    return getattr(layer, name)  # type: ignore[no-any-return]


@torch.no_grad()
def value_before(layer: nn.Module, kind: type[nn.Module], name: str = "weight") -> Tensor:
    """What the parametrizations of a layer's tensor hand to the first of type ``kind``; detached."""
    value: Tensor = whole(original(layer, name).detach())
    if parametrize.is_parametrized(layer, name):
        for link in layer.parametrizations[name]:  # type: ignore[index, union-attr]
            if isinstance(link, kind):
                break
            value = link(value)
    return value


@torch.no_grad()
def bake(model: nn.Module, types: tuple[type[nn.Module], ...]) -> None:
    """Remove the parametrizations of ``types``, leaving in the tensors what they, and those before, made.

    Parametrizations of other kinds that come later stay. The masked elements become zeros. Modules that share
    a tensor share it afterwards, too; copies of the model keep what they have.
    """
    found: list[tuple[nn.Module, str, list[nn.Module]]] = []
    values: dict[nn.Parameter, Tensor] = {}
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        chains: Any = module.parametrizations
        for name, chain in chains.items():
            links = list(chain)
            last = max((index for index, link in enumerate(links) if isinstance(link, types)), default=None)
            if last is None:
                continue
            found.append((module, name, links[last + 1 :]))
            if chain.original not in values:
                value = chain.original
                for link in links[: last + 1]:
                    value = link(value)
                values[chain.original] = value
    for parameter, value in values.items():
        parameter.copy_(value)
    for module, name, rest in found:
        give_own_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for link in rest:
            parametrize.register_parametrization(module, name, link)


def sparse_weights(model: nn.Module, names: Iterable[str]) -> Iterator[LoweredWeight]:
    """The weights with zeros among those of layers of a model without masks."""
    owners = Owners(model)
    for name in names:
        for path, layer, attribute in owners.of(model.get_submodule(name)):
            weight: Any = getattr(layer, attribute).detach()
            mask = weight != 0
            if not mask.all():
                yield LoweredWeight(f"{path}.{attribute}", layer, attribute, Sparse(weight, mask))


def kept_per_mask(masks: Sequence[Tensor]) -> list[int]:
    """Kept elements of each mask, in one transfer from the device."""
    if not masks:
        return []
    return [int(count) for count in torch.stack([mask.count_nonzero() for mask in masks]).tolist()]


def keep_counts(numels: Iterable[int], level: float) -> list[int]:
    """Elements to keep of tensors of ``numels`` elements: all but ``round(level * numel)``."""
    return [numel - round(level * numel) for numel in numels]
