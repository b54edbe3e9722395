"""How a quantized value is turned back into a number."""

from enum import StrEnum, auto

__all__ = ["QuantizationFormulation"]


class QuantizationFormulation(StrEnum):
    """``ZP``: ``(q - zero_point) * scale``. ``MINVAL``: ``(q - quant_min) * scale + minval``."""

    MINVAL = auto()
    ZP = auto()
