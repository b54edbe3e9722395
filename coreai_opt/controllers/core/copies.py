"""Copies of parametrized models that share nothing with the original."""

import copy

from torch import nn
from torch.nn.utils import parametrize

from coreai_opt.export.torch import give_own_class

__all__ = ["copy_model"]


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, parametrizations of which can be removed without the original losing its own."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            give_own_class(module)
    return copied
