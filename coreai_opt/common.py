"""What all kinds of compression share."""

from enum import StrEnum, auto

__all__ = ["CompressionType"]


class CompressionType(StrEnum):
    """The kinds of compression."""

    QUANTIZATION = auto()
    PALETTIZATION = auto()
    PRUNING = auto()
