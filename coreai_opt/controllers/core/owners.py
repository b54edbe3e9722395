"""Where a model holds its tensors, and parametrizations on all owners of a shared one."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["Owner", "Owners", "computed_by"]

Owner = tuple[str, nn.Module, str]
"""Name of a module, the module, and the attribute that holds the tensor."""


class Owners:
    """The owners of a model's parameters, parametrized ones included: several for one that is shared.

    Args:
        model: must keep its parameters while the object is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, list[Owner]] = {}
        for owner, parameter in _parameters(model):
            self._found.setdefault(id(parameter), []).append(owner)

    def of(self, layer: nn.Module, name: str = "weight") -> list[Owner]:
        """The owners of the tensor that ``layer`` holds as ``name``, in the model's order."""
        return self._found[id(_held(layer, name))]


def _parameters(model: nn.Module) -> Iterator[tuple[Owner, nn.Parameter]]:
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (path, module, name), parameter
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for name, chain in chains.items():
                if isinstance(getattr(chain, "original", None), nn.Parameter):
                    yield (path, module, name), chain.original


def _held(layer: nn.Module, name: str) -> Any:
    if parametrize.is_parametrized(layer, name):
        return layer.parametrizations[name].original  # type: ignore[index, union-attr]
    return layer._parameters[name]


def computed_by(layer: nn.Module, name: str = "weight") -> str | None:
    """What computes a layer's tensor anew in each forward, in words; None for a plain parameter.

    Parametrizations that :func:`.masks.install` put there do not count.
    """
    if parametrize.is_parametrized(layer, name):
        chain: Any = layer.parametrizations[name]  # type: ignore[index, union-attr]
        others = [type(link).__name__ for link in chain if not getattr(link, "_of_a_controller", False)]
        return f"the parametrization {', '.join(others)}" if others else None
    if layer._parameters.get(name) is not None:
        return None
    hooks = [type(hook).__name__ for hook in layer._forward_pre_hooks.values()]
    return f"a hook ({', '.join(hooks)})" if hooks else "something else than a parameter of its own"
