"""Containers whose own operations have simulators, which are not among the children that they iterate over.

Simulators are submodules of the module whose operations they serve. A sequence of layers would run them as
layers. As torch does for parametrizations, such a module gets a class derived from its own, which leaves them
out.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from coreai_opt._utils.config_utils import CLASS_BEFORE, original_type

__all__ = ["hide_simulator", "show_simulator"]

# The attribute of a module with the names of what it does not iterate over.
_HIDDEN = "_coreai_opt_hidden"


def hide_simulator(module: nn.Module, name: str) -> None:
    """Leave a submodule out where the module iterates over its children, if it is a container."""
    kind = next((each for each in _METHODS if isinstance(module, each)), None)
    if kind is None:
        return
    hidden = module.__dict__.get(_HIDDEN, frozenset())
    if not any(CLASS_BEFORE in vars(each) for each in type(module).__mro__):
        if is_parametrized(module):
            # torch has derived a class for this module; ours comes between it and the original one.
            type(module).__bases__ = (_class_for(original_type(module), kind),)
        else:
            module.__class__ = _class_for(type(module), kind)
    module.__dict__[_HIDDEN] = hidden | {name}


def show_simulator(module: nn.Module, name: str) -> None:
    """Undo :func:`hide_simulator` for a submodule that has been taken off."""
    hidden = module.__dict__.get(_HIDDEN)
    if hidden is None:
        return
    module.__dict__[_HIDDEN] = hidden - {name}
    before = vars(type(module)).get(CLASS_BEFORE)
    # Where a parametrization has derived a class in turn, this one stays, and hides nothing.
    if not module.__dict__[_HIDDEN] and before is not None:
        del module.__dict__[_HIDDEN]
        module.__class__ = before


def _children(module: nn.Module) -> dict[str, Any]:
    hidden = module.__dict__.get(_HIDDEN, ())
    return {name: child for name, child in module._modules.items() if name not in hidden}


def _values(module: nn.Module) -> Any:
    return iter(_children(module).values())


def _count(module: nn.Module) -> int:
    return len(_children(module))


def _keys(module: nn.Module) -> Any:
    return _children(module).keys()


def _names(module: nn.Module) -> Any:
    return iter(_children(module))


def _items(module: nn.Module) -> Any:
    return _children(module).items()


def _contents(module: nn.Module) -> Any:
    return _children(module).values()


def _layer(module: Any, index: Any) -> Any:
    """A child by its position, or a container of the original class with a slice of them."""
    children = _children(module)
    if not isinstance(index, slice):
        return list(children.values())[operator.index(index)]
    cls: Any = original_type(module)
    chosen = OrderedDict(list(children.items())[index])
    return cls(chosen) if isinstance(module, nn.Sequential) else cls(list(chosen.values()))


# By kind of container: its methods that look at the children, and those that leave simulators out.
_METHODS: dict[type[nn.Module], dict[str, Callable[..., Any]]] = {
    nn.Sequential: {"__iter__": _values, "__len__": _count, "__getitem__": _layer},
    nn.ModuleList: {"__iter__": _values, "__len__": _count, "__getitem__": _layer},
    nn.ModuleDict: {
        "__iter__": _names,
        "__len__": _count,
        "keys": _keys,
        "items": _items,
        "values": _contents,
    },
}


def _class_for(cls: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    # Methods that the user wrote stay.
    own = _METHODS[kind].items()
    methods = {name: method for name, method in own if getattr(cls, name) is getattr(kind, name)}
    made = {
        **methods,
        CLASS_BEFORE: cls,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__reduce_ex__": _reduce,
    }
    return type(cls.__name__, (cls,), made)


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # The class has no name of its own by which it could be imported.
    cls = next(vars(each)[CLASS_BEFORE] for each in type(module).__mro__ if CLASS_BEFORE in vars(each))
    return _restored, (cls,), module.__getstate__()


def _restored(cls: type[nn.Module]) -> nn.Module:
    kind = next(each for each in _METHODS if issubclass(cls, each))
    made = _class_for(cls, kind)
    module: nn.Module = made.__new__(made)
    return module
