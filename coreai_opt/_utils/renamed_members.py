"""Enums whose members had other names."""

import warnings
from enum import EnumType, StrEnum
from typing import Any

__all__ = ["RenamedMembersEnum"]


class _RenamedMembersType(EnumType):
    def __getattr__(cls, name: str) -> Any:
        new = cls._renamed().get(name.upper())
        if new is None:
            members = ", ".join(cls.__members__)
            raise AttributeError(f"{cls.__name__} has no member {name!r}; its members: {members}")
        _warn(f"{cls.__name__}.{name}", cls.__name__, new, stacklevel=3)
        return cls[new]

    def _renamed(cls) -> dict[str, str]:
        """The members' old names in capitals, and what they are called now."""
        return {}


class RenamedMembersEnum(StrEnum, metaclass=_RenamedMembersType):
    """Base of enums of strings that resolve old names of their members, with a DeprecationWarning.

    A subclass overrides :meth:`_renamed`. Old names are found in any case, as attributes and as values.
    """

    @classmethod
    def _renamed(cls) -> dict[str, str]:
        """The members' old names in capitals, and what they are called now."""
        return {}

    @classmethod
    def _missing_(cls, value: object) -> Any:
        new = cls._renamed().get(value.upper()) if isinstance(value, str) else None
        if new is None:
            return None
        # Behind two functions of the standard library.
        _warn(f"{cls.__name__}({value!r})", cls.__name__, new, stacklevel=5)
        return cls[new]


def _warn(written: str, enum: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{written} is deprecated: the member is called {enum}.{new} now",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
