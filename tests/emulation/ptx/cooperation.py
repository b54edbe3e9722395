"""What instructions do to the memory, to other threads and to the order in which threads run."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.emulation.ptx.instructions import control, halves, joined, operation, vector
from tests.emulation.ptx.memory import Fault
from tests.emulation.ptx.parsing import DTYPES, Instruction, Refused

if TYPE_CHECKING:
    from tests.emulation.ptx.machine import Block

__all__: list[str] = []

Array = np.ndarray[Any, Any]

_CACHING = re.compile(r"(L1|L2)__\w+|ca|cg|cs|lu|cv|wb|wt|nc|volatile|weak|relaxed|acquire|gpu|cta|v[248]$")
_PRED = DTYPES["pred"]


@control("bra")
def _bra(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow("uni")
    if i.operands[0] not in block.program.labels:
        raise Refused(i.text)
    block.position[lanes] = block.program.labels[i.operands[0]]


@control("ret", "exit")
def _exit(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow("uni")
    block.alive &= ~lanes


@control("trap")
def _trap(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    if lanes.any():
        raise Fault(f"the kernel stops itself: {i.text}")


@control("bar", "barrier")
def _barrier(block: "Block", i: Instruction, lanes: Array) -> None:
    if i.modifiers == ("warp", "sync"):
        return
    if "sync" not in i.allow("sync", "cta", "aligned") or i.operands != ("0",):
        raise Refused(i.text)
    block.waiting |= lanes


@operation("redux")
def _reduce_warp(block: "Block", i: Instruction, lanes: Array) -> None:
    modifiers = i.allow("sync", "min", "max", "add", "and", "or", "xor")
    _need_whole_warps(block, i, lanes)
    if np.any(block.read(i.operands[2], DTYPES["s32"]) != -1):
        raise Refused(i.text)
    functions: dict[str, np.ufunc] = {"min": np.minimum, "max": np.maximum, "add": np.add}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    (name,) = modifiers & set(functions)
    value = np.broadcast_to(block.read(i.operands[1], i.type), (block.threads,))
    result = np.zeros(block.threads, i.type)
    for warp in np.unique(block.warps[lanes]):
        here = lanes & (block.warps == warp)
        result[here] = functions[name].reduce(value[here])
    block.write(i.operands[0], result, lanes)


def _space(i: Instruction) -> tuple[str, int]:
    """Where an instruction reads or writes, and how many values."""
    others = [part for part in i.modifiers if part not in ("global", "shared", "shared__cta", "param")]
    if any(not _CACHING.match(part) for part in others):
        raise Refused(i.text)
    # An address of any space is one of global memory, or a fault.
    spaces = [part for part in i.modifiers if part not in others] or ["global"]
    if len(spaces) != 1:
        raise Refused(i.text)
    counts = [int(part[1:]) for part in others if re.fullmatch(r"v[248]", part)]
    return spaces[0].removesuffix("__cta"), counts[0] if counts else 1


@operation("ld")
def _load(block: "Block", i: Instruction, lanes: Array) -> None:
    space, count = _space(i)
    to = vector(i.operands[0])
    size = i.type.itemsize * count
    if len(to) != count:
        raise Refused(i.text)
    if space == "param" and re.match(r"\[\s*%", i.operands[1]):
        # An address that was computed: of an element of an array in a parameter.
        places = block.address(i.operands[1]).astype(np.int64)[lanes, None] + np.arange(size)
        if np.any((places < 0) | (places >= len(block.parameters))):
            raise Fault(f"beyond the parameters: {i.text}")
        found = np.zeros((block.threads, size), np.uint8)
        found[lanes] = np.frombuffer(block.parameters, np.uint8)[places]
    elif space == "param":
        offset, left = block.parameter(i.operands[1])
        if size > left:
            raise Refused(i.text)
        found = np.frombuffer(block.parameters[offset : offset + size], np.uint8)[None]
        found = np.broadcast_to(found, (block.threads, size))
    else:
        found = np.zeros((block.threads, size), np.uint8)
        found[lanes] = _read_memory(block, i.operands[1], space, size, lanes, i.text)
    for position, register in enumerate(to):
        piece = found[:, position * i.type.itemsize : (position + 1) * i.type.itemsize]
        block.write(register, np.ascontiguousarray(piece).view(i.type)[:, 0], lanes)


def _read_memory(block: "Block", operand: str, space: str, size: int, lanes: Array, text: str) -> Array:
    if space == "global":
        return block.memory.load(block.address(operand)[lanes], size, text)
    addresses = block.address(operand, _width_of_shared(block, operand))[lanes]
    return block.shared.load(addresses.astype(np.uint64), size, block.warps[lanes], text)


def _width_of_shared(block: "Block", operand: str) -> np.dtype:
    name = re.match(r"\[\s*([%\w.$]+)", operand)
    if name is None:
        raise Refused(operand)
    return block.program.width(name[1]) if name[1].startswith("%") else DTYPES["u32"]


@operation("st")
def _store(block: "Block", i: Instruction, lanes: Array) -> None:
    space, count = _space(i)
    sources = vector(i.operands[1])
    if len(sources) != count or space == "param":
        raise Refused(i.text)
    pieces = []
    for register in sources:
        value = np.broadcast_to(block.read(register, i.type), (block.threads,))[lanes]
        pieces.append(np.ascontiguousarray(value)[:, None].view(np.uint8))
    found = np.concatenate(pieces, 1)
    if space == "global":
        block.memory.store(block.address(i.operands[0])[lanes], found, i.text)
    else:
        addresses = block.address(i.operands[0], _width_of_shared(block, i.operands[0]))[lanes]
        block.shared.store(addresses.astype(np.uint64), found, block.warps[lanes], i.text)


@operation("ldmatrix", "stmatrix")
def _matrix(block: "Block", i: Instruction, lanes: Array) -> None:
    """8 × 8 matrices of 16-bit numbers; the threads of a warp have the addresses of their rows."""
    modifiers = i.allow("sync", "aligned", "m8n8", "x1", "x2", "x4", "shared", "trans")
    _need_whole_warps(block, i, lanes)
    count = next(int(part[1]) for part in ("x1", "x2", "x4") if part in modifiers)
    memory, registers = (1, 0) if i.name == "ldmatrix" else (0, 1)
    addresses = block.address(i.operands[memory], DTYPES["u32"]).astype(np.uint64)
    thread = np.arange(32)
    for warp in np.unique(block.warps[lanes]):
        of_warp = block.warps == warp
        own = np.flatnonzero(of_warp)
        for matrix, register in enumerate(vector(i.operands[registers])[:count]):
            rows = addresses[own[8 * matrix : 8 * matrix + 8]]
            by = np.full(8, warp)
            if i.name == "ldmatrix":
                numbers = np.ascontiguousarray(block.shared.load(rows, 16, by, i.text)).view(np.uint16)
                numbers = numbers.T if "trans" in modifiers else numbers
                low, high = numbers[thread // 4, thread % 4 * 2], numbers[thread // 4, thread % 4 * 2 + 1]
                value = np.zeros(block.threads, np.uint32)
                value[own] = joined(low, high)
                block.write(register, value, of_warp)
            else:
                value = block.read(register, DTYPES["u32"])[own]
                numbers = np.empty((8, 8), np.uint16)
                numbers[thread // 4, thread % 4 * 2], numbers[thread // 4, thread % 4 * 2 + 1] = halves(value)
                numbers = numbers.T if "trans" in modifiers else numbers
                block.shared.store(rows, np.ascontiguousarray(numbers).view(np.uint8), by, i.text)


def _need_whole_warps(block: "Block", i: Instruction, lanes: Array) -> None:
    """All threads of a warp that have not ended must be here."""
    warps = np.unique(block.warps[lanes])
    if np.any(np.isin(block.warps, warps) & block.alive & ~lanes):
        raise Fault(f"threads of the warp are elsewhere: {i.text}")


@operation("shfl")
def _shuffle(block: "Block", i: Instruction, lanes: Array) -> None:
    modifiers = i.allow("sync", "bfly", "down", "up", "idx")
    _need_whole_warps(block, i, lanes)
    to, *predicate = i.operands[0].split("|")
    value = np.broadcast_to(block.read(i.operands[1], DTYPES["u32"]), (block.threads,))
    amount, bound = (block.read(operand, DTYPES["s32"]) for operand in i.operands[2:4])
    if np.any(block.read(i.operands[4], DTYPES["s32"]) != -1):
        raise Refused(i.text)
    lane = np.arange(block.threads) % 32
    segment, last = (bound >> 8) & 31, bound & 31
    first = lane & segment
    end = first | (last & ~segment)
    if "up" in modifiers:
        source = lane - amount
        inside = source >= end
    else:
        if "bfly" in modifiers:
            source = lane ^ amount
        elif "down" in modifiers:
            source = lane + amount
        else:
            source = first | (amount & ~segment)
        inside = source <= end
    source = np.where(inside, source, lane) + np.arange(block.threads) // 32 * 32
    if np.any(~lanes[source] & lanes):
        raise Fault(f"reads a thread that has ended: {i.text}")
    block.write(to, value[source], lanes)
    if predicate:
        block.write(predicate[0], np.broadcast_to(inside, (block.threads,)), lanes)


@operation("vote")
def _vote(block: "Block", i: Instruction, lanes: Array) -> None:
    modifiers = i.allow("sync", "ballot", "any", "all")
    _need_whole_warps(block, i, lanes)
    source = i.operands[1]
    says = np.broadcast_to(block.read(source.lstrip("!"), _PRED) != source.startswith("!"), (block.threads,))
    if np.any(block.read(i.operands[2], DTYPES["s32"]) != -1):
        raise Refused(i.text)
    by_warp = np.zeros((int(block.warps[-1]) + 1, 32), bool)
    by_warp.reshape(-1)[: block.threads] = says & lanes
    if "ballot" in modifiers:
        words = (by_warp.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1).astype(np.uint32)
    elif "any" in modifiers:
        words = by_warp.any(1)
    else:
        here = np.zeros_like(by_warp)
        here.reshape(-1)[: block.threads] = lanes
        words = (by_warp | ~here).all(1)
    block.write(i.operands[0], words[block.warps], lanes)


@operation("atom", "red")
def _atomic(block: "Block", i: Instruction, lanes: Array) -> None:
    """A thread after the other."""
    modifiers = i.allow(
        *("global", "shared", "relaxed", "acq_rel", "release", "gpu", "cta"),
        *("add", "min", "max", "or", "and", "exch"),
    )
    operands = i.operands if i.name == "atom" else ("_", *i.operands)
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "or": np.bitwise_or,
        "and": np.bitwise_and,
        "exch": lambda old, new: new,
    }
    (name,) = modifiers & set(functions)
    if "shared" in modifiers or (i.type.kind == "f" and name != "exch"):
        raise Refused(i.text)  # sums of floating-point numbers depend on their order
    addresses = block.address(operands[1])
    given = np.broadcast_to(block.read(operands[2], i.type), (block.threads,))
    before = np.zeros(block.threads, i.type)
    for thread in np.flatnonzero(lanes):
        at = addresses[thread : thread + 1]
        old = block.memory.load(at, i.type.itemsize, i.text).view(i.type)[0]
        new = functions[name](old, given[thread : thread + 1])
        block.memory.store(at, np.ascontiguousarray(new).view(np.uint8)[None], i.text)
        before[thread] = old[0]
    block.write(operands[0], before, lanes)
