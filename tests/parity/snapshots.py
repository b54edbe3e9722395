"""Results as plain data, which travels between processes, and how two results are compared."""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Raised", "Snapshot", "differences", "freeze"]


@dataclass(frozen=True)
class Snapshot:
    """A tensor's dtype, shape and bytes, in logical order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> "Snapshot":
        flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
        return cls(str(tensor.dtype)[6:], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())

    def tensor(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.data), dtype=torch.uint8).view(dtype).reshape(self.shape)


@dataclass(frozen=True)
class Raised:
    """An exception: the qualified names of its classes from the most special one up, and its message."""

    classes: tuple[str, ...]
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Raised":
        names = tuple(f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__ if c is not object)
        return cls(names, str(error))

    @property
    def public_class(self) -> str:
        """The class that a caller can name: the first one that is not private to a package under test."""
        return next(name for name in self.classes if not name.startswith("coreai_"))


def freeze(value: Any) -> Any:
    """``value`` as tuples, dicts, numbers, strings and snapshots.

    Raises:
        TypeError: for a value with no such form.
    """
    if value is None or isinstance(value, bool | int | float | str | Snapshot | Raised):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, Tensor):
        return Snapshot.of(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, Mapping):
        return {str(key): freeze(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return tuple(sorted(map(str, map(freeze, value))))
    if isinstance(value, tuple | list):
        return tuple(map(freeze, value))
    raise TypeError(f"no plain form for {type(value).__name__}")


def differences(expected: Any, found: Any, where: str = "", by_value: bool = False) -> Iterator[str]:
    """Lines that say where ``found`` differs from ``expected``; none if they agree.

    Tensors agree when dtype, shape and bits do, any NaN being equal to any other; ``by_value`` says that -0.0
    equals 0.0 too (it holds below every key ``state`` and ``qparams``). Exceptions agree when ours is an
    instance of the public class of the expected one.
    """
    if isinstance(expected, Snapshot) and isinstance(found, Snapshot):
        yield from _tensor_differences(expected, found, where, by_value)
    elif isinstance(expected, Raised) and isinstance(found, Raised):
        if expected.public_class not in found.classes:
            yield f"{where}: expected {expected.public_class} ({_short(expected)}), got {_short(found)}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        if list(expected) != list(found):
            yield f"{where}: expected keys {list(expected)}, got {list(found)}"
        for key in expected.keys() & found.keys():
            values = by_value or key in ("state", "qparams")
            yield from differences(expected[key], found[key], f"{where}.{key}", values)
    elif isinstance(expected, tuple) and isinstance(found, tuple) and len(expected) == len(found):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{where}[{index}]", by_value)
    elif type(expected) is not type(found) or (expected != found and expected == expected):
        yield f"{where}: expected {_short(expected)}, got {_short(found)}"


def _short(value: Any) -> str:
    if isinstance(value, Raised):
        return f"{value.classes[0]}: {value.message.splitlines()[0] if value.message else ''}"[:200]
    if isinstance(value, Snapshot):
        return f"a {value.dtype} tensor of shape {value.shape}"
    return repr(value)[:300]


def _tensor_differences(expected: Snapshot, found: Snapshot, where: str, by_value: bool) -> Iterator[str]:
    if expected == found:
        return
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        yield f"{where}: expected {_short(expected)}, got {_short(found)}"
        return
    one, other = expected.tensor().reshape(-1), found.tensor().reshape(-1)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    bits, other_bits = one.view(integers), other.view(integers)
    same = bits == other_bits
    if one.dtype.is_floating_point:
        wide, other_wide = one.double(), other.double()
        same |= wide.isnan() & other_wide.isnan()
        if by_value:
            same |= wide == other_wide
    if same.all():
        return
    wrong = (~same).nonzero().flatten().tolist()
    index = wrong[0]
    position = [int(i) for i in torch.unravel_index(torch.tensor(index), expected.shape or (1,))]
    yield (
        f"{where}: {len(wrong)} of {one.numel()} elements differ ({expected.dtype}, shape {expected.shape}); "
        f"first at {position}: expected {one[index].item()!r} (bits {_hex(bits[index])}), "
        f"got {other[index].item()!r} (bits {_hex(other_bits[index])})"
    )


def _hex(bits: Tensor) -> str:
    return hex(int(bits) & ((1 << (8 * bits.element_size())) - 1))
