"""One class for the parametrized modules that torch gives a class each.

Python remembers where a class keeps its attributes, for some hundred classes. A model of two hundred
parametrized layers has two hundred more of them, and searches anew at each call of a module.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["share_classes"]

_FROM_TORCH = {"__deepcopy__", "__doc__", "__getstate__", "__module__"}


class SharedClass(type):
    """The class of parametrized modules that share it.

    With a parametrization, torch takes the property for its tensor off the module's class. Here it stays for
    the other modules; where there is no parametrization of that name, it gives way to what the module holds.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        """Set an attribute for all modules; a property for those that have a parametrization of that name."""
        if type(value) is property and value.fget is not None:
            value = property(_where_parametrized(name, value.fget), value.fset)
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        """Delete an attribute, unless it is a property."""
        if not isinstance(cls.__dict__.get(name), property):
            super().__delattr__(name)


def _has_parametrized(module: nn.Module, name: str) -> bool:
    """Whether the module has a parametrization of that name."""
    parametrizations: Any = module.__dict__["_modules"].get("parametrizations")
    return parametrizations is not None and name in parametrizations._modules


def _where_parametrized(name: str, get: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
    def read(module: nn.Module) -> Any:
        if not _has_parametrized(module, name):
            raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
        return get(module)

    return read


def share_classes(model: nn.Module) -> None:
    """Give parametrized modules of one kind, with the same parametrized tensors, the same class."""
    by_kind: dict[tuple[Any, ...], list[nn.Module]] = {}
    for module in model.modules():
        cls = type(module)
        # A class with a metaclass, or with anything that torch did not put there, stays as it is.
        if is_parametrized(module) and type(cls) is type:
            names = tuple(sorted(module.parametrizations._modules))  # type: ignore[union-attr, arg-type]
            if vars(cls).keys() == {*names, *(_FROM_TORCH & vars(cls).keys())}:
                by_kind.setdefault((cls.__bases__, names), []).append(module)
    for modules in by_kind.values():
        if len(modules) > 1:
            first = type(modules[0])
            shared: Any = SharedClass(first.__name__, first.__bases__, dict(vars(first)))
            for module in modules:
                module.__class__ = shared  # type: ignore[assignment]
