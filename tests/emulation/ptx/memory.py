"""Memory as threads see it: tensors at their own addresses, and a block's shared memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Fault", "Global", "Shared"]

Array = np.ndarray[Any, Any]


class Fault(Exception):
    """Something that a GPU would answer with an error, or with whatever it happens to do."""


def _checked_alignment(addresses: Array, size: int, text: str) -> None:
    if np.any(addresses % size):
        raise Fault(f"an address that is no multiple of {size}: {text}")


class Global:
    """The bytes of tensors, and no others.

    Args:
        tensors: on the CPU, dense; what kernels may read and write.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pieces: dict[tuple[int, int], Array] = {}
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if size:
                start = tensor.data_ptr()
                self._pieces[start, start + size] = _bytes_at(tensor, size)

    def _found(self, addresses: Array, size: int, text: str) -> list[tuple[Array, Array, Array]]:
        """For each tensor that is used: the threads, its bytes, and the positions in it."""
        left = np.ones(len(addresses), bool)
        found = []
        for (start, end), data in self._pieces.items():
            here = left & (addresses >= start) & (addresses + size <= end)
            if here.any():
                found.append((here, data, (addresses[here] - start).astype(np.int64)))
                left &= ~here
                if not left.any():
                    return found
        where = ", ".join(f"{start:#x} to {end:#x}" for start, end in self._pieces)
        raise Fault(
            f"{int(left.sum())} threads use memory outside of the tensors ({where}), "
            f"at {addresses[left][0]:#x}: {text}"
        )

    def load(self, addresses: Array, size: int, text: str) -> Array:
        """``size`` bytes for each address: ``(threads, size)``."""
        _checked_alignment(addresses, size, text)
        result = np.empty((len(addresses), size), np.uint8)
        for here, data, positions in self._found(addresses, size, text):
            result[here] = data[positions[:, None] + np.arange(size)]
        return result

    def store(self, addresses: Array, values: Array, text: str) -> None:
        """The same number of bytes to each address; of two threads at one address the later wins."""
        size = values.shape[1]
        _checked_alignment(addresses, size, text)
        for here, data, positions in self._found(addresses, size, text):
            data[positions[:, None] + np.arange(size)] = values[here]


def _bytes_at(tensor: Tensor, size: int) -> Array:
    import ctypes

    return np.frombuffer((ctypes.c_uint8 * size).from_address(tensor.data_ptr()), np.uint8)


class Shared:
    """Shared memory of a block. Bytes that one warp writes are no other's before the next barrier.

    Args:
        size: in bytes.
    """

    def __init__(self, size: int) -> None:
        self.data = np.full(size, 0xA5, np.uint8)
        self._epoch = 1
        # When bytes were last written and read, and by which warp; -1: by several.
        self._written, self._writer = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._read, self._reader = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def barrier(self) -> None:
        """All threads have met."""
        self._epoch += 1

    def _places(self, addresses: Array, size: int, text: str) -> Array:
        _checked_alignment(addresses, size, text)
        if np.any(addresses + size > len(self.data)):
            raise Fault(f"beyond the {len(self.data)} bytes of shared memory: {text}")
        result: Array = addresses.astype(np.int64)[:, None] + np.arange(size)
        return result

    def load(self, addresses: Array, size: int, warps: Array, text: str) -> Array:
        """``size`` bytes for each address: ``(threads, size)``."""
        places = self._places(addresses, size, text)
        by = np.broadcast_to(warps[:, None], places.shape)
        if np.any((self._written[places] == self._epoch) & (self._writer[places] != by)):
            raise Fault(f"reads what another warp wrote, without a barrier: {text}")
        for warp in np.unique(warps):
            mine = places[warps == warp]
            others = (self._read[mine] == self._epoch) & (self._reader[mine] != warp)
            self._reader[mine] = np.where(others, -1, warp)
            self._read[mine] = self._epoch
        result: Array = self.data[places]
        return result

    def store(self, addresses: Array, values: Array, warps: Array, text: str) -> None:
        """The same number of bytes to each address."""
        places = self._places(addresses, values.shape[1], text)
        by = np.broadcast_to(warps[:, None], places.shape)
        changes = self.data[places] != values
        race = (self._read[places] == self._epoch) & (self._reader[places] != by)
        race |= (self._written[places] == self._epoch) & (self._writer[places] != by)
        if np.any(race & changes):
            raise Fault(f"overwrites what another warp uses, without a barrier: {text}")
        self.data[places] = values
        if np.any(self.data[places] != values):
            raise Fault(f"threads write different values to one address: {text}")
        self._written[places], self._writer[places] = self._epoch, by
