"""From the text of PTX to kernels: parameters, shared memory, instructions and labels."""

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

__all__ = ["DTYPES", "Instruction", "Kernel", "Parameter", "Refused", "kernel"]

DTYPES = {
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype("?"),
}
_ALIGNED = re.compile(r"\.align\s+(\d+)")
_PARAMETER = re.compile(r"\.param\s+(.*?)\s*([\w$]+)(?:\[(\d+)\])?$", re.S)
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?$", re.S)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")


class Refused(Exception):
    """Text that the interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: as it was written.
        name: ``"add"`` of ``add.rn.f32``.
        types: ``("f32",)`` of it, in order.
        modifiers: the rest: ``("rn",)``.
        operands: a register, number, symbol, ``[address]`` or ``{vector}`` each.
        predicate: register that decides whether a thread takes part.
        is_negated: whether it must be false.
    """

    text: str
    name: str
    types: tuple[str, ...]
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None = None
    is_negated: bool = False

    @property
    def type(self) -> np.dtype:
        """The only type."""
        if len(self.types) != 1:
            raise Refused(self.text)
        return self.dtype(0)

    def dtype(self, index: int) -> np.dtype:
        """One of several types."""
        if index >= len(self.types) or self.types[index] not in DTYPES:
            raise Refused(self.text)
        return DTYPES[self.types[index]]

    def allow(self, *modifiers: str) -> set[str]:
        """The modifiers.

        Raises:
            Refused: one of them is not among those given.
        """
        if set(self.modifiers) - set(modifiers):
            raise Refused(self.text)
        return set(self.modifiers)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel: where it is in the parameters' memory, and its bytes."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """An entry of PTX text.

    Attributes:
        name: of the entry.
        parameters: by name.
        symbols: offsets of shared variables.
        shared: bytes of those whose size is known.
        widths: types of registers that are declared one by one, or by a prefix (``%r`` of ``%r<9>``).
        instructions: in order.
        labels: index of the instruction behind each.
    """

    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    symbols: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    widths: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def width(self, register: str) -> np.dtype:
        """Type of a register."""
        found = self.widths.get(register) or self.widths.get(register.rstrip("0123456789"))
        if found is None:
            raise Refused(f"register {register}")
        return DTYPES[found]


@lru_cache(maxsize=64)
def kernel(text: str, name: str | None = None) -> Kernel:
    """The kernel ``name`` of PTX text, or the only one.

    Raises:
        Refused: there is none of that name, or it has parts that are not known.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
    found = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{;]*)\{", text, re.S))
    chosen = [match for match in found if name in (None, match[1])]
    if len(chosen) != 1:
        raise Refused(f"kernel {name}; there are {[match[1] for match in found]}")
    made = Kernel(chosen[0][1])
    for declared in re.finditer(r"^[ \t]*(?:\.(?:extern|visible|weak)\s+)*(\.shared[^;]*);", text, re.M):
        if declared.start() < chosen[0].start():
            _add_shared(made, declared[1])
    _add_parameters(made, chosen[0][2])
    _add_body(made, _body(text, chosen[0].end()))
    return made


def _body(text: str, start: int) -> str:
    depth, position = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
    return text[start : position - 1]


def _add_parameters(made: Kernel, text: str) -> None:
    offset = 0
    for declared in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.match(declared)
        type_ = re.search(r"\.([busf]\d+)\b", match[1]) if match else None
        if match is None or type_ is None:
            raise Refused(declared)
        element = DTYPES[type_[1]].itemsize
        size = element * int(match[3] or 1)
        aligned = _ALIGNED.search(match[1])
        # `.ptr .global .align 16` is about what a pointer points to.
        alignment = int(aligned[1]) if aligned and ".ptr" not in match[1] else element
        offset = -(-offset // alignment) * alignment
        made.parameters[match[2]] = Parameter(match[2], offset, size)
        offset += size


def _add_shared(made: Kernel, text: str) -> None:
    match = _SHARED.match(text.strip())
    if match is None:
        raise Refused(text)
    alignment = int(match[1] or DTYPES[match[2]].itemsize)
    made.shared = -(-made.shared // alignment) * alignment
    made.symbols[match[3]] = made.shared
    made.shared += DTYPES[match[2]].itemsize * (int(match[4] or 0) if match[4] is not None else 1)


def _add_body(made: Kernel, text: str) -> None:
    """Scopes rename the registers that they declare."""
    scopes: list[dict[str, str]] = [{}]
    position, serial = 0, 0
    while position < len(text):
        if text[position].isspace():
            position += 1
        elif text[position] == "{":
            scopes.append({})
            position += 1
        elif text[position] == "}":
            scopes.pop()
            position += 1
        elif label := _LABEL.match(text, position):
            made.labels[label[1]] = len(made.instructions)
            position = label.end()
        else:
            end = text.index(";", position)
            statement = " ".join(text[position:end].split())
            position = end + 1
            if registers := _REGISTERS.match(statement):
                for name in (part.strip() for part in registers[2].split(",")):
                    prefix = name.partition("<")[0]
                    if len(scopes) > 1:
                        serial += 1
                        scopes[-1][prefix] = f"%{prefix.removeprefix('%')}.{serial}."
                    made.widths[scopes[-1].get(prefix, prefix)] = registers[1]
            elif statement.startswith(".shared"):
                _add_shared(made, statement)
            elif statement.startswith(".pragma"):
                continue
            elif statement:
                made.instructions.append(_instruction(_renamed(statement, scopes)))


def _renamed(statement: str, scopes: list[dict[str, str]]) -> str:
    for scope in scopes[1:]:
        for prefix, new in scope.items():
            statement = re.sub(rf"(?<![\w%$]){re.escape(prefix)}(?=\d*\b)(?!\w*[a-zA-Z_])", new, statement)
    return statement


def _instruction(text: str) -> Instruction:
    match = re.match(r"(?:@(!?)([%\w.$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
    if match is None:
        raise Refused(text)
    name, *parts = match[3].replace("::", "__").split(".")
    types = tuple(
        part for part in parts if part in DTYPES or part in ("bf16", "bf16x2", "f16x2", "f32x2", "e4m3x2")
    )
    modifiers = tuple(part for part in parts if part not in types)
    operands = tuple(_split(match[4]))
    return Instruction(text, name, types, modifiers, operands, match[2], match[1] == "!")


def _split(text: str) -> list[str]:
    """Operands: what commas outside of brackets separate."""
    found, depth, current = [], 0, ""
    for character in text:
        depth += {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += character
    return [*found, current.strip()] if current.strip() else found
