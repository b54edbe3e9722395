"""Counts the instructions that a thread runs, in the listing of a kernel's machine code.

The main path is followed: from the entry to the exit, past out-of-line code. Where a branch has a choice,
the main path is the way that stores most, then has fewest calls and divisions, then loads most: IEEE
division calls its slow part for operands near the ends of the range, and a kernel that has a quick way and a
careful one divides in the careful one only. What is equal in this is not skipped. A loop counts as often as
it takes to load what the thread has to read.
"""

import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import triton

__all__ = ["Counts", "Line", "count", "disassemble", "parse", "resources", "width"]

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_PREDICATE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+@(!?U?P\w+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_UNIFORM = re.compile(r"^\s*!?U?P[0-9]\s*,")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_KERNEL = re.compile(r"^\.text\.([\w$]+):")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
# Nothing is issued for these, or only once the kernel is over.
_FREE = ("NOP",)
_ROUNDS = 20


@dataclass
class Line:
    """An instruction of a listing; ``target`` is the label that it jumps to."""

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
    lines, labels = parse(listing)
    found = Counts()
    weights = _weights(lines, _loops(lines, labels), bytes_to_read, found)
    waiting = False
    for position in _main_path(lines, labels):
        line, weight = lines[position], weights[position]
        kind = line.name.split(".")[0]
        if kind not in _FREE:
            found.instructions += weight
        if kind == "LDG":
            size = width(line.name)
            found.loaded += size * weight
            if not waiting and weight:
                found.in_flight += size
        elif kind == "STG":
            found.stored += width(line.name) * weight
            waiting = True
    return found


def _main_path(lines: Sequence[Line], labels: dict[str, int]) -> list[int]:
    """Positions of the instructions from the entry to the exit.

    Raises:
        ValueError: the kernel branches indirectly, or has no exit.
    """
    for line in lines:
        if line.name.startswith(("BRX", "JMX")):
            raise ValueError("the kernel branches indirectly")
    # Where a loop that ends in a jump to its start is left.
    back_edges = {
        last: [
            labels[line.target]
            for line in lines[first:last]
            if line.name.startswith("BRA") and line.target is not None and labels[line.target] > last
        ]
        for first, last in _loops(lines, labels)
    }
    # What lies ahead: bytes stored; calls and divisions, as a negative number; bytes loaded; and where to go
    # on. Code that lies behind its continuation takes another round.
    none = (-math.inf, 0.0, 0.0)
    ahead: list[tuple[tuple[float, float, float], int | None]] = [(none, None)] * (len(lines) + 1)
    for _ in range(_ROUNDS):
        before = list(ahead)
        for position in range(len(lines) - 1, -1, -1):
            line = lines[position]
            kind = line.name.split(".")[0]
            if kind == "EXIT" and not line.is_conditional:
                ahead[position] = ((0.0, 0.0, 0.0), None)
                continue
            goals = [position + 1]
            if position in back_edges and not line.is_conditional:
                goals = back_edges[position]
                if not goals:  # left by a conditional EXIT
                    ahead[position] = ((0.0, 0.0, 0.0), None)
                    continue
            elif kind == "BRA" and line.target is not None and position not in back_edges:
                goal = labels[line.target]
                if not line.is_conditional:
                    goals = [goal]
                elif goal > position:
                    goals.append(goal)
            (stored, slow, loaded), goal = max(
                ((ahead[goal][0], goal) for goal in goals), key=lambda pair: pair[0]
            )
            size = width(line.name)
            slow -= kind in ("CALL", "FCHK")
            ahead[position] = ((stored + size * (kind == "STG"), slow, loaded + size * (kind == "LDG")), goal)
        if ahead == before:
            break
    else:
        raise ValueError("the main path does not settle")
    if ahead[0][0] == none:
        raise ValueError("the listing ends before the kernel does")
    path: list[int] = []
    position: int | None = 0
    while position is not None:
        path.append(position)
        if len(path) > len(lines):
            raise ValueError("the main path goes in a circle")
        position = ahead[position][1]
    return path


def parse(listing: str) -> tuple[list[Line], dict[str, int]]:
    """The instructions of the kernel, and where labels are; functions that it calls come behind it."""
    lines: list[Line] = []
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
            is_conditional = is_conditional or bool(_UNIFORM.match(instruction[3]) and target)
            if instruction[2].startswith("BRA.DIV"):  # for warps whose threads have parted
                target = None
            lines.append(Line(instruction[2], instruction[3], is_conditional, target[1] if target else None))
    return lines, labels


def _loops(lines: Sequence[Line], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of each loop on the main path."""
    found = []
    for position, line in enumerate(lines):
        if line.name.startswith("BRA") and line.target is not None:
            goal = labels[line.target]
            # The last instruction of a listing branches to itself; out-of-line code branches back.
            if goal < position and not _leaves(lines[goal:position]):
                found.append((goal, position))
    return found


def _leaves(lines: Sequence[Line]) -> bool:
    return any(line.name.startswith(("EXIT", "RET")) and not line.is_conditional for line in lines)


def _weights(
    lines: Sequence[Line], loops: Sequence[tuple[int, int]], bytes_to_read: float, found: Counts
) -> list[int]:
    """How often each instruction runs."""
    weights = [1] * len(lines)
    inside = {position for first, last in loops for position in range(first, last + 1)}
    for first, last in loops:
        if any((a, b) != (first, last) and a <= first and last <= b for a, b in loops):
            raise ValueError("the kernel has a loop inside of a loop")
        loads = [width(line.name) for line in lines[first : last + 1] if line.name.startswith("LDG")]
        # A compiler that loads ahead has the first round's loads in front of the loop; parameters are
        # narrower.
        ahead = sum(
            width(line.name)
            for position, line in enumerate(lines)
            if line.name.startswith("LDG")
            and position not in inside
            and width(line.name) == max(loads, default=0)
        )
        runs = max(math.ceil((bytes_to_read - ahead) / sum(loads)), 0) if loads else 1
        found.loops.append(runs)
        for position in range(first, last + 1):
            weights[position] = runs
    return weights


def width(name: str) -> int:
    return next((_WIDTHS[part] for part in name.split(".") if part in _WIDTHS), 4)
