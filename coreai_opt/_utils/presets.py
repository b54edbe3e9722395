"""Ready configurations as an attribute of the class that they are configurations of."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

__all__ = ["PresetsOf"]

_C = TypeVar("_C")


class PresetsOf(Generic[_C]):
    """Base of presets. As a class attribute it makes objects of the class through which it is read.

    So presets need not know the module of that class, which knows theirs.
    """

    _class: Callable[..., _C]

    def __get__(self, instance: object, owner: Any) -> Self:
        """The presets of ``owner``."""
        bound = type(self)()
        bound._class = owner
        return bound
