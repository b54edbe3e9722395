"""Copies of parametrized models that share nothing with the original."""

import copy

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["copy_model"]


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, parametrizations of which can be removed.

    A parametrized module has a class of its own, with a property for each parametrized tensor, and torch
    removes a parametrization by deleting the property. A deep copy shares the class: the original would lose
    the property, too. Here the copies get classes of their own.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            own = {
                name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")
            }
            module.__class__ = type(shared.__name__, shared.__bases__, own)
    return copied
