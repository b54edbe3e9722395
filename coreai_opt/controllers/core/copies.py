"""Copies of parametrized models that share nothing with the original."""

import copy

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["copy_model", "give_own_class"]


def give_own_class(module: nn.Module) -> None:
    """Let a parametrized module share its class with no other.

    torch makes a class for each parametrized module, with a property for each such tensor, and removes
    a parametrization by deleting the property. A deep copy of the module shares the class: it would lose the
    property, too.
    """
    shared = type(module)
    own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, own)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, parametrizations of which can be removed without the original losing its own."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            give_own_class(module)
    return copied
