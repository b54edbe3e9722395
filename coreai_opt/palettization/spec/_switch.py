"""A switch that is a buffer anybody may write, read without waiting for the device."""

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["MirroredSwitch"]


class MirroredSwitch:
    """Host copy of a one-element buffer, read again only after the buffer has changed."""

    __slots__ = ("_seen", "on")

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self._seen: tuple[Tensor | None, int] = (None, -1)

    def adopt(self, buffer: Tensor) -> None:
        """Take it that the buffer, as it is now, holds the mirrored value."""
        # Inference tensors count no versions: never equal, so they are read each time.
        self._seen = (buffer, -1 if buffer.is_inference() else buffer._version)

    def update(self, buffer: Tensor) -> None:
        """Read the buffer again if it has changed."""
        seen, version = self._seen
        if seen is buffer and not buffer.is_inference() and version == buffer._version:
            return
        # Tensors without data keep what was known before they lost it.
        if not (buffer.is_meta or isinstance(buffer, FakeTensor)):
            self.on = bool(buffer.item())
        self.adopt(buffer)

    def __reduce__(self) -> tuple[Any, ...]:
        return MirroredSwitch, (self.on,)
