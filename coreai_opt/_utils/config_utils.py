"""Which configuration is meant for which module, and what configurations are made of."""

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from coreai_opt._utils.registry_utils import registry_key

__all__ = [
    "CLASS_BEFORE",
    "ConfigLevel",
    "canonical_names",
    "did_you_mean",
    "full_match",
    "is_type_named",
    "matching_names",
    "original_type",
    "plain_data",
    "qualified_name",
]


class ConfigLevel(Enum):
    """Where in a configuration a module's entry stands. The lower value takes precedence."""

    MODULE_NAME = 1
    MODULE_TYPE = 2
    GLOBAL = 3


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A hint at the nearest of ``known``, to end a message with; empty if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def qualified_name(module_type: type) -> str:
    """The dotted name of a class, e.g. ``torch.nn.modules.linear.Linear``."""
    return f"{module_type.__module__}.{module_type.__qualname__}"


# In the dict of a class that a compressor made for a module: the class that the module had.
CLASS_BEFORE = "_coreai_opt_class_before"


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class of the module as its author knows it, without what torch or a compressor derived from it."""
    cls: type[nn.Module] = type_before_parametrizations(module) if is_parametrized(module) else type(module)
    return vars(cls).get(CLASS_BEFORE, cls)


def is_type_named(module_type: type, name: str) -> bool:
    """Whether ``name`` is a dotted path to exactly this class, e.g. ``torch.nn.Linear``."""
    if name == qualified_name(module_type):
        return True
    package, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(package), attribute, None) is module_type


def full_match(pattern: str, name: str) -> bool:
    """Whether the regular expression ``pattern`` matches the whole of ``name``.

    Raises:
        re.error: ``pattern`` is no regular expression.
    """
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise re.error(f"{pattern!r} is not a valid regular expression: {error}") from error


def canonical_names(model: nn.Module) -> dict[str, str]:
    """The first name of each module in ``model``, by all the names that it has."""
    first = {id(module): name for name, module in model.named_modules()}
    return {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False)}


def matching_names(pattern: str, names: Mapping[str, str]) -> set[str]:
    """First names of the modules that ``pattern`` matches under any name. Warns if there are none."""
    found = {first for name, first in names.items() if full_match(pattern, name)}
    if not found:
        near = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.4)
        candidates = near or [name for name in names if name][:5]
        warnings.warn(
            f"module_name_configs: the pattern {pattern!r} matches no module of the model, so that it has "
            f"no effect. It must match a whole name, such as {', '.join(map(repr, candidates))}.",
            UserWarning,
            stacklevel=3,
        )
    return found


def _refuse_class(cls: type) -> Any:
    raise ValueError(f"{qualified_name(cls)} has no registry key, so that YAML cannot name it")


def plain_data(value: Any, unregistered: Callable[[type], Any] = _refuse_class) -> Any:
    """``value``, a dumped configuration, in the types that YAML has: classes become their registry keys.

    Args:
        value: what to convert.
        unregistered: what becomes of a class without a key. By default a ValueError.
    """
    if isinstance(value, Mapping):
        return {plain_data(key, unregistered): plain_data(each, unregistered) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(each, unregistered) for each in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, type):
        key = registry_key(value)
        return unregistered(value) if key is None else key
    return value
