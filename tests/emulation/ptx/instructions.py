"""What instructions do to the registers of each thread."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.emulation.ptx import values
from tests.emulation.ptx.memory import Fault
from tests.emulation.ptx.parsing import DTYPES, Instruction, Refused

if TYPE_CHECKING:
    from tests.emulation.ptx.machine import Block

__all__ = ["CONTROL", "OPERATIONS", "Operation", "control", "halves", "joined", "operation", "vector"]

Array = np.ndarray[Any, Any]
Operation = Callable[["Block", Instruction, Array], None]

OPERATIONS: dict[str, Operation] = {}
CONTROL: dict[str, Operation] = {}

_PRED = DTYPES["pred"]


def operation(*names: str) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def control(*names: str) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        CONTROL.update(dict.fromkeys(names, function))
        return function

    return register


def inputs_of(block: "Block", i: Instruction, dtype: np.dtype) -> list[Array]:
    return [block.read(operand, dtype) for operand in i.operands[1:]]


def vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")]


@operation("mov")
def _mov(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    to, source = i.operands
    if to.startswith("{"):
        parts = vector(to)
        whole = block.read(source, np.dtype(f"u{i.type.itemsize}"))
        bits = 8 * i.type.itemsize // len(parts)
        for position, part in enumerate(parts):
            piece = whole >> whole.dtype.type(bits * position)
            block.write(part, piece.astype(np.dtype(f"u{bits // 8}")), lanes)
    elif source.startswith("{"):
        parts = vector(source)
        size = i.type.itemsize // len(parts)
        unsigned = np.dtype(f"u{i.type.itemsize}")
        total = np.zeros(1, unsigned)
        for position, part in enumerate(parts):
            value = block.read(part, np.dtype(f"u{size}")).astype(unsigned)
            total = total | (value << unsigned.type(8 * size * position))
        block.write(to, total, lanes)
    else:
        block.write(to, block.read(source, i.type), lanes)


@operation("cvta")
def _cvta(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow("to", "global")
    block.write(i.operands[0], block.read(i.operands[1], i.type), lanes)


@operation("add", "sub", "mul", "mad", "fma")
def _arithmetic(block: "Block", i: Instruction, lanes: Array) -> None:
    if i.types in (("bf16",), ("bf16x2",), ("f16x2",)):
        block.write(i.operands[0], _of_16_bits(block, i), lanes)
        return
    if i.types == ("f32x2",):
        pairs = [_pair(x) for x in inputs_of(block, i, DTYPES["u64"])]
        low, high = (
            _of_floats(i, list(parts), DTYPES["f32"]).view(np.uint32) for parts in zip(*pairs, strict=True)
        )
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        block.write(i.operands[0], both, lanes)
    elif i.type.kind == "f":
        block.write(i.operands[0], _of_floats(i, inputs_of(block, i, i.type), i.type), lanes)
    else:
        block.write(i.operands[0], _of_integers(block, i), lanes)


def _pair(x: Array) -> list[Array]:
    halves = (x & np.uint64(0xFFFFFFFF), x >> np.uint64(32))
    return [half.astype(np.uint32).view(np.float32) for half in halves]


def _of_floats(i: Instruction, inputs: list[Array], dtype: np.dtype) -> Array:
    modifiers = i.allow("rn", "ftz")
    if "ftz" in modifiers:
        inputs = [values.flushed(x) for x in inputs]
    if i.name == "fma" and dtype == np.float32 and "rn" in modifiers:
        result = values.fma(*inputs)
    elif i.name in ("add", "sub", "mul"):
        # Without a rounding a compiler may contract; `rn` says that it must not.
        if "rn" not in modifiers and dtype != np.float64:
            raise Refused(f"a product or sum that may be contracted: {i.text}")
        result = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[i.name](*inputs)
    else:
        raise Refused(i.text)
    return values.flushed(result) if "ftz" in modifiers else result


def _of_integers(block: "Block", i: Instruction) -> Array:
    dtype, modifiers = i.type, i.allow("lo", "hi", "wide")
    a, b = (block.read(operand, dtype) for operand in i.operands[1:3])
    if i.name in ("add", "sub") and not modifiers:
        return a + b if i.name == "add" else a - b
    if i.name not in ("mul", "mad") or len(modifiers) != 1 or (dtype.itemsize == 8 and "lo" not in modifiers):
        raise Refused(i.text)
    if "lo" in modifiers:
        result = a * b
    else:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        result = a.astype(wide) * b.astype(wide)
        if "hi" in modifiers:
            result = (result >> wide.type(8 * dtype.itemsize)).astype(dtype)
    return result + block.read(i.operands[3], result.dtype) if i.name == "mad" else result


def _of_16_bits(block: "Block", i: Instruction) -> Array:
    """One or two numbers in a register."""
    i.allow("rn")
    is_pair, is_bfloat16 = i.types[0].endswith("x2"), i.types[0].startswith("b")
    words = [halves(x) if is_pair else [x] for x in inputs_of(block, i, DTYPES["u32" if is_pair else "u16"])]
    exact = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }
    if i.name not in exact or len(words) != (3 if i.name == "fma" else 2):
        raise Refused(i.text)
    results = []
    for parts in zip(*words, strict=True):
        # Products and sums of these are exact in float64, or far from a tie.
        single = exact[i.name](*(_widened(part, is_bfloat16).astype(np.float64) for part in parts))
        if np.any((single.astype(np.float32) != single) & np.isfinite(single)):
            raise Refused(f"a sum that float32 does not hold: {i.text}")
        results.append(_narrowed(single.astype(np.float32), is_bfloat16))
    return joined(*results) if is_pair else results[0]


def _widened(words: Array, is_bfloat16: bool) -> Array:
    return values.from_bfloat16(words) if is_bfloat16 else words.view(np.float16).astype(np.float32)


def _narrowed(x: Array, is_bfloat16: bool) -> Array:
    return values.bfloat16(x) if is_bfloat16 else x.astype(np.float16).view(np.uint16)


def halves(x: Array) -> list[Array]:
    return [(x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)]


def joined(low: Array, high: Array) -> Array:
    result: Array = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
    return result


@operation("div", "rem")
def _divide(block: "Block", i: Instruction, lanes: Array) -> None:
    dtype = i.type
    a, b = inputs_of(block, i, dtype)
    if dtype.kind == "f":
        # Not `approx` nor `full`: their last bits are the hardware's own.
        if i.name != "div" or i.allow("rn") != {"rn"}:
            raise Refused(i.text)
        block.write(i.operands[0], a / b, lanes)
        return
    i.allow()
    if np.any((b == 0) & lanes):
        raise Fault(f"a division by zero: {i.text}")
    # Towards zero; NumPy's goes down.
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if dtype.kind == "i":
        remainder = a - quotient * divisor
        quotient = quotient + ((remainder != 0) & ((a < 0) != (divisor < 0))).astype(dtype)
    block.write(i.operands[0], quotient if i.name == "div" else a - quotient * divisor, lanes)


@operation("rcp")
def _reciprocal(block: "Block", i: Instruction, lanes: Array) -> None:
    """The hardware's is one unit in the last place off, either way; so are these, by the number's bits."""
    if i.allow("approx", "ftz") != {"approx", "ftz"} or i.types != ("f32",):
        raise Refused(i.text)
    x = values.flushed(inputs_of(block, i, i.type)[0])
    near = values.flushed(np.float32(1) / x)
    units = (x.view(np.int32) % 3 - 1).astype(np.int32)
    other = (np.atleast_1d(near).view(np.int32) + units).view(np.float32)
    block.write(i.operands[0], np.where(np.isfinite(near) & (near != 0), other, near), lanes)


@operation("sqrt")
def _sqrt(block: "Block", i: Instruction, lanes: Array) -> None:
    if i.allow("rn") != {"rn"}:
        raise Refused(i.text)
    block.write(i.operands[0], np.sqrt(inputs_of(block, i, i.type)[0]), lanes)


@operation("neg", "abs", "not")
def _unary(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    (x,) = inputs_of(block, i, i.type)
    if i.type.kind == "f":
        unsigned = np.dtype(f"u{i.type.itemsize}")
        sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
        raw = x.view(unsigned)
        if i.name == "not":
            raise Refused(i.text)
        result = (raw ^ sign if i.name == "neg" else raw & ~sign).view(i.type)
    elif i.name == "not":
        result = ~x
    else:
        result = -x if i.name == "neg" else np.abs(x)
    block.write(i.operands[0], result, lanes)


@operation("min", "max")
def _extreme(block: "Block", i: Instruction, lanes: Array) -> None:
    modifiers = i.allow("NaN")
    if i.types in (("bf16x2",), ("f16x2",)):
        block.write(i.operands[0], _extreme_of_pairs(block, i, "NaN" in modifiers), lanes)
        return
    result, *others = inputs_of(block, i, i.type)
    for other in others:
        if i.type.kind == "f":
            function = values.minimum if i.name == "min" else values.maximum
            result = function(result, other, "NaN" in modifiers)
        else:
            result = np.minimum(result, other) if i.name == "min" else np.maximum(result, other)
    block.write(i.operands[0], result, lanes)


def _extreme_of_pairs(block: "Block", i: Instruction, nan_wins: bool) -> Array:
    function = values.minimum if i.name == "min" else values.maximum
    is_bfloat16 = i.types == ("bf16x2",)
    words = [halves(x) for x in inputs_of(block, i, DTYPES["u32"])]
    found = [
        _narrowed(function(*(_widened(part, is_bfloat16) for part in parts), nan_wins), is_bfloat16)
        for parts in zip(*words, strict=True)
    ]
    return joined(*found)


@operation("and", "or", "xor")
def _bitwise(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.name]
    block.write(i.operands[0], function(*inputs_of(block, i, i.type)), lanes)


@operation("lop3")
def _lop3(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    a, b, c = (block.read(operand, i.type) for operand in i.operands[1:4])
    table, result = int(i.operands[4].rstrip("U"), 0), np.zeros(1, i.type)
    for row in range(8):
        if table >> row & 1:
            terms = [x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            result = result | (terms[0] & terms[1] & terms[2])
    block.write(i.operands[0], result, lanes)


@operation("shl", "shr")
def _shift(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    x, bits = block.read(i.operands[1], i.type), 8 * i.type.itemsize
    amount = block.read(i.operands[2], DTYPES["u32"])
    kept = np.minimum(amount, bits - 1).astype(i.type)
    if i.name == "shl":
        result = np.where(amount < bits, x << kept, i.type.type(0))
    elif i.type.kind == "i":
        result = x >> kept
    else:
        result = np.where(amount < bits, x >> kept, i.type.type(0))
    block.write(i.operands[0], result.astype(i.type), lanes)


@operation("shf")
def _funnel_shift(block: "Block", i: Instruction, lanes: Array) -> None:
    modifiers = i.allow("l", "r", "wrap", "clamp")
    low, high, amount = inputs_of(block, i, DTYPES["u32"])
    amount = amount & np.uint32(31) if "wrap" in modifiers else np.minimum(amount, 32)
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    by = np.uint64(32) - amount.astype(np.uint64) if "l" in modifiers else amount.astype(np.uint64)
    block.write(i.operands[0], (both >> by).astype(np.uint32), lanes)


@operation("bfe")
def _extract(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    x = block.read(i.operands[1], i.type)
    start, length = (int(operand.rstrip("U"), 0) for operand in i.operands[2:])
    if not 0 <= start <= start + length <= 8 * i.type.itemsize or length == 0:
        raise Refused(i.text)
    left = x << i.type.type(8 * i.type.itemsize - start - length)
    block.write(i.operands[0], left >> i.type.type(8 * i.type.itemsize - length), lanes)


@operation("bfi")
def _insert(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    what, into = (block.read(operand, i.type) for operand in i.operands[1:3])
    start, length = (int(operand.rstrip("U"), 0) for operand in i.operands[3:])
    field = i.type.type(((1 << length) - 1) << start)
    block.write(i.operands[0], (into & ~field) | ((what << i.type.type(start)) & field), lanes)


@operation("prmt")
def _permute(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    a, b, selector = (block.read(operand, DTYPES["u32"]) for operand in i.operands[1:])
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(1, np.uint32)
    for position in range(4):
        choice = (selector >> np.uint32(4 * position)) & np.uint32(15)
        byte = ((both >> (8 * (choice & np.uint32(7))).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        result = result | (byte << np.uint32(8 * position))
    block.write(i.operands[0], result.astype(np.uint32), lanes)


@operation("popc", "clz", "brev")
def _count_bits(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    x = block.read(i.operands[1], i.type)
    bits = (x[:, None] >> np.arange(8 * i.type.itemsize, dtype=i.type)) & i.type.type(1)
    if i.name == "popc":
        result = bits.sum(1)
    elif i.name == "clz":
        result = np.where(x == 0, bits.shape[1], bits[:, ::-1].argmax(1))
    else:
        result = (bits[:, ::-1].astype(np.uint64) << np.arange(bits.shape[1], dtype=np.uint64)).sum(1)
        block.write(i.operands[0], result.astype(i.type), lanes)
        return
    block.write(i.operands[0], result.astype(np.uint32), lanes)


@operation("selp")
def _select(block: "Block", i: Instruction, lanes: Array) -> None:
    i.allow()
    chosen = block.read(i.operands[3], _PRED)
    a, b = (block.read(operand, i.type) for operand in i.operands[1:3])
    block.write(i.operands[0], np.where(chosen, a, b), lanes)


@operation("setp", "set")
def _compare(block: "Block", i: Instruction, lanes: Array) -> None:
    name, *more = i.modifiers
    dtype = i.dtype(len(i.types) - 1)
    a, b, *others = i.operands[1:]
    result = values.compare(name, block.read(a, dtype), block.read(b, dtype))
    if result is None or len(more) != len(others):
        raise Refused(i.text)
    other = _PRED.type(True)
    for function, operand in zip(more, others, strict=True):
        if function not in ("and", "or", "xor"):
            raise Refused(i.text)
        other = block.read(operand.lstrip("!"), _PRED) != operand.startswith("!")
        result, against = _combined(function, result, other), _combined(function, ~result, other)
    if i.name == "set":
        kind = i.dtype(0)
        true = kind.type(1) if kind.kind == "f" else np.array([-1], f"i{kind.itemsize}").view(kind)
        block.write(i.operands[0], np.where(result, true, kind.type(0)), lanes)
        return
    to, *second = i.operands[0].split("|")
    block.write(to, result, lanes)
    if second:
        block.write(second[0], against if more else ~result, lanes)


def _combined(name: str, a: Array, b: Array) -> Array:
    result: Array = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name](a, b)
    return result


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("cvt")
def _convert(block: "Block", i: Instruction, lanes: Array) -> None:
    to, source = i.types[0], i.types[-1]
    modifiers = i.allow("rn", "rni", "rzi", "rmi", "rpi", "rna")
    if to in ("bf16", "bf16x2"):
        if modifiers != {"rn"} or source != "f32":
            raise Refused(i.text)
        words = [values.bfloat16(x) for x in inputs_of(block, i, DTYPES["f32"])]
        # The first operand is the upper half.
        block.write(i.operands[0], joined(words[1], words[0]) if to == "bf16x2" else words[0], lanes)
        return
    if source == "bf16":
        if to != "f32" or modifiers:
            raise Refused(i.text)
        block.write(i.operands[0], values.from_bfloat16(block.read(i.operands[1], DTYPES["u16"])), lanes)
        return
    if to == "f16x2" and source == "f32" and modifiers == {"rn"}:
        halves = [x.astype(np.float16).view(np.uint16) for x in inputs_of(block, i, DTYPES["f32"])]
        block.write(i.operands[0], joined(halves[1], halves[0]), lanes)
        return
    result_type, source_type = i.dtype(0), i.dtype(1)
    (x,) = inputs_of(block, i, source_type)
    if source_type.kind != "f":
        if result_type.kind == "f" and modifiers != {"rn"}:
            raise Refused(i.text)
        result = x.astype(result_type)
    elif result_type == source_type and len(modifiers) == 1 and modifiers <= set(_TO_WHOLE):
        (name,) = modifiers
        result = np.copysign(_TO_WHOLE[name](x), x)
    elif result_type.kind == "f":
        if (result_type.itemsize < source_type.itemsize) != (modifiers == {"rn"}) or modifiers - {"rn"}:
            raise Refused(i.text)
        result = x.astype(result_type)
    elif (
        len(modifiers) == 1 and "rn" not in modifiers and "rna" not in modifiers and result_type.itemsize < 8
    ):
        result = values.to_integer(x, result_type, *modifiers)
    else:
        raise Refused(i.text)
    block.write(i.operands[0], result, lanes)
