"""What weights are compressed to, and what shares parameters."""

from enum import StrEnum, auto
from typing import Any, TypeVar

__all__ = ["CompressionGranularity", "DType", "QScheme", "member"]

_E = TypeVar("_E", bound=StrEnum)


class DType(StrEnum):
    """Types of stored values and scales."""

    INT2 = auto()
    UINT2 = auto()
    INT4 = auto()
    UINT4 = auto()
    INT8 = auto()
    UINT8 = auto()
    FP4_E2M1FN = auto()
    FP8_E4M3FN = auto()
    FP8_E5M2 = auto()
    FP8_E8M0FNU = auto()

    def is_int(self) -> bool:
        """Whether values are integers."""
        return "int" in self.value


class QScheme(StrEnum):
    """How quantized values lie around zero."""

    SYMMETRIC = auto()
    ASYMMETRIC = auto()


class CompressionGranularity(StrEnum):
    """Which elements of a weight share a scale or a palette."""

    PER_TENSOR = auto()
    PER_CHANNEL = auto()
    PER_BLOCK = auto()
    PER_GROUPED_CHANNEL = auto()


def member(kind: type[_E], argument: str, value: Any, allowed: tuple[_E, ...] | None = None) -> _E:
    """The member of an enumeration that ``value`` is or names.

    Raises:
        ValueError: it is none, or not among ``allowed``.
    """
    choices = tuple(kind) if allowed is None else allowed
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}; got {value!r}")
    return kind(value)
