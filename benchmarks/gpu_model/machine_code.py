"""Counts the instructions that a thread runs, in the listing of a kernel's machine code.

The main path is followed: from the entry to the exit, past out-of-line code. A branch around a call is taken
(IEEE division calls its slow part for operands near the ends of the range); other forward branches are not,
so that what they skip counts. A loop counts as often as it takes to load what the thread has to read.
"""

import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

__all__ = ["Counts", "count", "disassemble", "resources"]

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_PREDICATE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+@(!?U?P\w+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_KERNEL = re.compile(r"^\.text\.([\w$]+):")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
# Nothing is issued for these, or only once the kernel is over.
_FREE = ("NOP",)


@dataclass
class _Line:
    name: str
    operands: str
    is_conditional: bool
    target: str | None


@dataclass
class Counts:
    """What one thread does on the main path.

    Attributes:
        instructions: how many it issues.
        loaded, stored: bytes of global memory that it reads and writes.
        in_flight: bytes that it asks for before it waits for the first of them.
        loops: loops that were counted, and how often each runs.
    """

    instructions: int = 0
    loaded: int = 0
    stored: int = 0
    in_flight: int = 0
    loops: list[int] = field(default_factory=list)


def disassemble(cubin: bytes, folder: Path) -> str:
    """The listing of machine code, by the disassembler in Triton's wheel.

    Raises:
        RuntimeError: it fails.
    """
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.nvdisasm.path
    done = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local memory, as the assembler wrote them into the machine code."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    printed = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", printed)}


def count(listing: str, bytes_to_read: float) -> Counts:
    """Follow the main path of the only kernel in a listing.

    Args:
        listing: of :func:`disassemble`.
        bytes_to_read: what a thread reads of the large tensors, for the number of a loop's runs.

    Raises:
        ValueError: the path cannot be followed: an indirect branch, or loops inside of loops.
    """
    lines, labels = _parsed(listing)
    loops = _loops(lines, labels)
    found, position, weight = Counts(), 0, 1
    waiting = False
    weights = _weights(lines, loops, bytes_to_read, found)
    while position < len(lines):
        line = lines[position]
        weight = weights[position]
        kind = line.name.split(".")[0]
        if kind not in _FREE:
            found.instructions += weight
        if kind == "LDG":
            size = _width(line.name)
            found.loaded += size * weight
            if not waiting:
                found.in_flight += size
        elif kind == "STG":
            found.stored += _width(line.name) * weight
            waiting = True
        if kind == "EXIT" and not line.is_conditional:
            return found
        if kind in ("BRX", "JMX"):
            raise ValueError("the kernel branches indirectly")
        position += 1
        if kind == "BRA" and line.target is not None:
            goal = labels[line.target]
            is_ahead = goal >= position
            if is_ahead and (not line.is_conditional or _has_call(lines[position:goal])):
                position = goal
    raise ValueError("the listing ends before the kernel does")


def _parsed(listing: str) -> tuple[list[_Line], dict[str, int]]:
    """The instructions of the kernel, and where labels are; functions that it calls come behind it."""
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    inside = False
    for text in listing.splitlines():
        if _KERNEL.match(text):
            inside = True
        if not inside:
            continue
        if label := _LABEL.match(text):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(text):
            target = _TARGET.search(instruction[3])
            predicate = _PREDICATE.match(text)
            is_conditional = predicate is not None and predicate[1] not in ("PT", "UPT")
            lines.append(_Line(instruction[2], instruction[3], is_conditional, target[1] if target else None))
    return lines, labels


def _has_call(lines: Sequence[_Line]) -> bool:
    return any(line.name.startswith("CALL") for line in lines)


def _loops(lines: Sequence[_Line], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of each loop on the main path."""
    found = []
    for position, line in enumerate(lines):
        if line.name.startswith("BRA") and line.target is not None:
            goal = labels[line.target]
            # The last instruction of a listing branches to itself; out-of-line code branches back.
            if goal < position and not _leaves(lines[goal:position]):
                found.append((goal, position))
    return found


def _leaves(lines: Sequence[_Line]) -> bool:
    return any(line.name.startswith(("EXIT", "RET")) and not line.is_conditional for line in lines)


def _weights(
    lines: Sequence[_Line], loops: Sequence[tuple[int, int]], bytes_to_read: float, found: Counts
) -> list[int]:
    """How often each instruction runs."""
    weights = [1] * len(lines)
    outside = sum(
        _width(line.name)
        for position, line in enumerate(lines)
        if line.name.startswith("LDG") and not any(a <= position <= b for a, b in loops)
    )
    for first, last in loops:
        if any((a, b) != (first, last) and a <= first and last <= b for a, b in loops):
            raise ValueError("the kernel has a loop inside of a loop")
        loads = sum(_width(line.name) for line in lines[first : last + 1] if line.name.startswith("LDG"))
        # A compiler that loads ahead has the first round's loads in front of the loop.
        runs = max(math.ceil((bytes_to_read - outside) / loads), 1) if loads else 1
        found.loops.append(runs)
        for position in range(first, last + 1):
            weights[position] = runs
    return weights


def _width(name: str) -> int:
    return next((_WIDTHS[part] for part in name.split(".") if part in _WIDTHS), 4)
