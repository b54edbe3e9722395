"""The threads of a block: their registers, and the order in which they run."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.emulation.ptx import cooperation  # noqa: F401 (fills the tables)
from tests.emulation.ptx.instructions import CONTROL, OPERATIONS
from tests.emulation.ptx.memory import Fault, Global, Shared
from tests.emulation.ptx.parsing import DTYPES, Instruction, Kernel, Refused, kernel

__all__ = ["Block", "launch"]

Array = np.ndarray[Any, Any]

MOST_STEPS = 200_000
_TURN = 100  # pieces that a block of a whole grid runs before the next
_NUMBER = re.compile(r"-?\d+$|-?0[xX][0-9a-fA-F]+$")
_OFFSET = re.compile(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Block:
    """A block of threads.

    Args:
        program: what they run.
        threads: how many, 32 of them a warp.
        index: of the block along the grid's axes; ``grid``: how many there are.
        parameters: the parameters' memory.
        memory: what they may read and write.
        shared: bytes of shared memory beyond what the kernel declares.
        whole_grid: address of what the blocks of a grid that is started as a whole have in common; 0: there
            is no such thing.
    """

    def __init__(
        self,
        program: Kernel,
        threads: int,
        index: tuple[int, ...],
        grid: tuple[int, ...],
        parameters: bytes,
        memory: Global,
        shared: int,
        whole_grid: int = 0,
    ) -> None:
        self.program = program
        self.threads = threads
        self.memory = memory
        self.shared = Shared(program.shared + shared)
        self.parameters = parameters
        self.warps = np.arange(threads) // 32
        self._registers: dict[str, Array] = {}
        self._special = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%laneid": np.arange(threads, dtype=np.uint32) % 32,
            **{
                name: np.array([number], np.uint32) for name, number in _numbers(threads, index, grid).items()
            },
            # Where the CUDA driver says what a whole grid has in common.
            "%envreg1": np.array([whole_grid >> 32], np.uint32),
            "%envreg2": np.array([whole_grid & 0xFFFFFFFF], np.uint32),
        }
        self.alive = np.ones(threads, bool)
        self.waiting = np.zeros(threads, bool)
        self.position = np.zeros(threads, np.int64)
        self._starts = set(program.labels.values())

    def run(self) -> None:
        """All threads, to their ends."""
        for _ in self.pieces():
            pass

    def pieces(self) -> Iterator[None]:
        """The same, a piece at a time.

        Those that are furthest behind run, together, up to the next place where threads can part or meet.
        """
        steps = 0
        while self.alive.any():
            ready = self.alive & ~self.waiting
            if not ready.any():
                self.waiting[:] = False
                self.shared.barrier()
                continue
            position = int(self.position[ready].min())
            together = ready & (self.position == position)
            steps += self._run_piece(position, together)
            if steps > MOST_STEPS:
                raise Fault(f"more than {MOST_STEPS} steps: the kernel does not seem to end")
            yield

    def _run_piece(self, position: int, together: Array) -> int:
        """Instructions up to the next label or branch; how many."""
        first = position
        while True:
            if position >= len(self.program.instructions):
                raise Fault("threads run past the end of the kernel")
            instruction = self.program.instructions[position]
            position += 1
            lanes = together
            if instruction.predicate is not None:
                lanes = together & (
                    self.read(instruction.predicate, DTYPES["pred"]) != instruction.is_negated
                )
            if instruction.name in CONTROL:
                self.position[together] = position
                CONTROL[instruction.name](self, instruction, lanes)
                return position - first
            if lanes.any():
                self._step(instruction, lanes)
            if position in self._starts:
                self.position[together] = position
                return position - first

    def _step(self, instruction: Instruction, lanes: Array) -> None:
        operation = OPERATIONS.get(instruction.name)
        if operation is None:
            raise Refused(instruction.text)
        try:
            with np.errstate(all="ignore"):
                operation(self, instruction, lanes)
        except (Refused, Fault):
            raise
        except Exception as error:
            raise RuntimeError(f"at {instruction.text}") from error

    def read(self, operand: str, dtype: np.dtype) -> Array:
        """An operand: a register, a number, a special register or the address of a shared variable."""
        if operand.startswith("%"):
            raw = self._special.get(operand)
            if raw is None:
                raw = self._register(operand)
            if raw.dtype.itemsize < dtype.itemsize or (raw.dtype.kind == "b") != (dtype.kind == "b"):
                raise Refused(f"operand {operand} as {dtype}")
            if raw.dtype.itemsize > dtype.itemsize:
                raw = raw.astype(np.dtype(f"u{dtype.itemsize}"))
            return raw.view(dtype)
        if operand[:2] in ("0f", "0F", "0d", "0D"):
            bits = np.array([int(operand[2:], 16)], np.uint32 if operand[1] in "fF" else np.uint64)
            if bits.dtype.itemsize != dtype.itemsize:
                raise Refused(f"operand {operand} as {dtype}")
            return bits.view(dtype)
        number = operand.rstrip("U")
        if _NUMBER.match(number):
            value = int(number, 0)
            if dtype.kind == "b":
                return np.array([bool(value)])
            bits = 8 * dtype.itemsize
            return np.array([value & ((1 << bits) - 1)], np.dtype(f"u{dtype.itemsize}")).view(dtype)
        if operand in self.program.parameters:
            offset = self.program.parameters[operand].offset
            return np.array([offset], np.dtype(f"u{dtype.itemsize}")).view(dtype)
        if operand in self.program.symbols:
            return np.array([self.program.symbols[operand]], np.dtype(f"u{dtype.itemsize}")).view(dtype)
        raise Refused(f"operand {operand}")

    def _register(self, name: str) -> Array:
        found = self._registers.get(name)
        if found is None:
            width = self.program.width(name)
            # Nothing was written yet: not zeros, that nothing relies on them.
            garbage = np.full(self.threads * width.itemsize, 0xA5, np.uint8)
            unsigned = np.dtype(f"u{width.itemsize}")
            found = np.zeros(self.threads, bool) if width.kind == "b" else garbage.view(unsigned)
            self._registers[name] = found
        return found

    def write(self, operand: str, value: Array, lanes: Array) -> None:
        """A register of some threads; narrower values are extended by their sign, if they have one."""
        if operand == "_":
            return
        old = self._register(operand)
        if (old.dtype.kind == "b") != (value.dtype.kind == "b"):
            raise Refused(f"register {operand} from {value.dtype}")
        if value.dtype.itemsize > old.dtype.itemsize:
            raise Refused(f"register {operand} is too small for {value.dtype}")
        if value.dtype.itemsize < old.dtype.itemsize:
            if value.dtype.kind == "f":
                raise Refused(f"register {operand} from {value.dtype}")
            value = value.astype(np.dtype(f"{value.dtype.kind}{old.dtype.itemsize}"))
        raw = value if value.dtype == old.dtype else value.view(old.dtype)
        self._registers[operand] = np.where(lanes, raw, old)

    def address(self, operand: str, dtype: np.dtype = DTYPES["u64"]) -> Array:
        """What a ``[register + offset]`` comes to, for each thread."""
        match = _OFFSET.match(operand)
        if match is None:
            raise Refused(f"address {operand}")
        start = self.read(match[1], dtype)
        if match[2]:
            start = start + self.read(match[2], dtype)
        return np.broadcast_to(start, (self.threads,))

    def parameter(self, operand: str) -> tuple[int, int]:
        """Offset of a parameter's ``[name + offset]``, and the bytes behind it."""
        match = _OFFSET.match(operand)
        found = self.program.parameters.get(match[1]) if match else None
        if match is None or found is None:
            raise Refused(f"parameter {operand}")
        more = int(match[2] or 0)
        return found.offset + more, found.size - more


def _numbers(threads: int, index: tuple[int, ...], grid: tuple[int, ...]) -> dict[str, int]:
    found = {f"%ctaid.{axis}": number for axis, number in zip("xyz", index, strict=True)}
    found |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", grid, strict=True)}
    return found | {"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}


def launch(
    ptx: str,
    blocks: int | tuple[int, ...],
    threads: int,
    arguments: Sequence[Any],
    *,
    name: str | None = None,
    shared: int = 0,
    reverse: bool = False,
    whole: bool = False,
    reachable: Sequence[Tensor] = (),
) -> None:
    """Run a kernel, a block after the other.

    Args:
        ptx: the text that has it.
        blocks: of the grid, or along each of its axes.
        threads: of a block.
        arguments: tensors on the CPU, None for a null pointer, NumPy scalars or bytes, as the parameters are.
        name: of the kernel, where the text has several.
        shared: bytes of dynamic shared memory.
        reverse: start with the last block.
        whole: blocks are there at the same time, and take turns: they may wait for each other.
        reachable: tensors that are no arguments, but pointed to.

    Raises:
        Refused: something in the text is not known.
        Fault: the kernel does what is not defined.
        ValueError: the arguments are not what the kernel takes.
    """
    program = kernel(ptx, name)
    parameters = _packed(program, arguments)
    common = torch.zeros(2 if whole else 0, dtype=torch.int64)
    memory = Global([each for each in (*arguments, *reachable, common) if isinstance(each, Tensor)])
    grid = ((blocks,) if isinstance(blocks, int) else blocks) + (1, 1)
    order = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    address = common.data_ptr() if whole else 0
    found = (
        Block(program, threads, index, grid[:3], parameters, memory, shared, address)
        for index in (reversed(order) if reverse else order)
    )
    if whole:
        _run_together(list(found))
    else:
        for block in found:
            block.run()


def _run_together(blocks: Sequence[Block]) -> None:
    going = [block.pieces() for block in blocks]
    while going:
        # Who does not use its turn up has ended.
        going = [pieces for pieces in going if sum(1 for _ in islice(pieces, _TURN)) == _TURN]


def _packed(program: Kernel, arguments: Sequence[Any]) -> bytes:
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{program.name} takes {len(program.parameters)} arguments, not {len(arguments)}")
    packed = bytearray()
    for parameter, argument in zip(program.parameters.values(), arguments, strict=True):
        if argument is None or isinstance(argument, Tensor):
            given = np.uint64(0 if argument is None else argument.data_ptr()).tobytes()
        else:
            given = argument if isinstance(argument, bytes) else np.asarray(argument).tobytes()
        if len(given) != parameter.size:
            raise ValueError(f"{parameter.name} has {parameter.size} bytes; given: {argument!r}")
        packed += bytes(parameter.offset - len(packed)) + given
    return bytes(packed)
