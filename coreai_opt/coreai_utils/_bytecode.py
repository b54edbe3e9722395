"""Reads the large constants out of a module's bytecode.

The bindings of Core AI show no values of constants that are stored as resources; the bytecode does. Its
format is documented at https://mlir.llvm.org/docs/BytecodeFormat.
"""

import io
from collections.abc import Iterator
from typing import Any

__all__ = ["resources"]

_MAGIC = b"ML\xefR"
_STRINGS, _RESOURCES, _RESOURCE_OFFSETS = 0, 5, 6
_BLOB = 0


class _Reader:
    """Reads numbers from bytes, one after another."""

    def __init__(self, data: memoryview, position: int = 0) -> None:
        self.data = data
        self.position = position

    def byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def number(self) -> int:
        """A number whose first byte's trailing zeros count the bytes that follow."""
        first = self.data[self.position]
        if first == 0:
            self.position += 9
            return int.from_bytes(self.data[self.position - 8 : self.position], "little")
        length = (first & -first).bit_length()
        self.position += length
        return int.from_bytes(self.data[self.position - length : self.position], "little") >> length

    def text(self) -> None:
        """Pass over a text that ends with a zero byte."""
        while self.byte():
            pass

    def align(self, alignment: int) -> None:
        self.position += -self.position % alignment

    @property
    def is_done(self) -> bool:
        return self.position >= len(self.data)


def resources(module: Any) -> dict[str, memoryview]:
    """The bytes of each resource of an MLIR module, by the name in ``dense_resource<name>``.

    Raises:
        RuntimeError: the bytecode is of another format than the documented one.
    """
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    data = memoryview(buffer.getbuffer())
    sections = dict(_sections(data))
    if _RESOURCE_OFFSETS not in sections:
        return {}
    names = _strings(data[slice(*sections[_STRINGS])])
    start, end = sections[_RESOURCES]
    found, position = {}, start
    for key, size, kind in _entries(data[slice(*sections[_RESOURCE_OFFSETS])]):
        if kind == _BLOB:
            found[names[key]] = _blob(data, position)
        position += size
    if position > end:
        raise RuntimeError("the resources of the module's bytecode are longer than their section")
    return found


def _sections(data: memoryview) -> Iterator[tuple[int, tuple[int, int]]]:
    """The kind of each section, and where its contents begin and end."""
    if bytes(data[:4]) != _MAGIC:
        raise RuntimeError("the module's bytecode does not begin as MLIR bytecode does")
    reader = _Reader(data, 4)
    reader.number()  # the version
    reader.text()  # the producer
    while not reader.is_done:
        kind = reader.byte()
        length = reader.number()
        if kind & 0x80:
            reader.align(reader.number())
        yield kind & 0x7F, (reader.position, reader.position + length)
        reader.position += length


def _strings(data: memoryview) -> list[str]:
    reader = _Reader(data)
    # The lengths, from the last text to the first, include the zero byte at the end of each.
    lengths = [reader.number() for _ in range(reader.number())][::-1]
    texts = []
    for length in lengths:
        texts.append(bytes(data[reader.position : reader.position + length - 1]).decode())
        reader.position += length
    return texts


def _entries(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """The name's number, the size and the kind of each resource: those of other owners, then of dialects."""
    reader = _Reader(data)
    reader.number()  # how many groups belong to other owners; all groups look alike
    while not reader.is_done:
        reader.number()  # the owner
        for _ in range(reader.number()):
            yield reader.number(), reader.number(), reader.byte()


def _blob(data: memoryview, position: int) -> memoryview:
    reader = _Reader(data, position)
    alignment, size = reader.number(), reader.number()
    reader.align(alignment)
    return data[reader.position : reader.position + size]
