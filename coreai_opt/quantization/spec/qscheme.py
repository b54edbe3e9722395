"""How a range becomes a scale and a zero point."""

from enum import StrEnum, auto

from coreai_kernels import Scheme

__all__ = ["QuantizationScheme"]


class QuantizationScheme(StrEnum):
    """How the quantized values lie around zero.

    ``SYMMETRIC`` spans equal distances to both sides; ``SYMMETRIC_WITH_CLIPPING`` also gives up the smallest
    integer of signed types, so that the quantized values themselves are symmetric; ``ASYMMETRIC`` spans just
    the range, with a zero point.
    """

    SYMMETRIC = auto()
    ASYMMETRIC = auto()
    SYMMETRIC_WITH_CLIPPING = auto()

    @property
    def kernel_scheme(self) -> Scheme:
        """The engine's name for it."""
        return Scheme[self.name]
