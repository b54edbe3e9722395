"""Where a forward is intercepted: decided once, so that a call only counts and looks up by position."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor, nn

__all__ = ["CallGroup", "Origin", "Site", "origin_of"]

# Where in the source a call is: of each Python frame from the call up to that of the module, the function's
# name, its first line, and the instruction.
Origin = tuple[tuple[str, int, int], ...]

_MODULE_CALL = nn.Module._call_impl.__code__


def origin_of(frame: FrameType | None, caller: FrameType | None) -> Origin | None:
    """Where a call is in the source; None if it is not the module's own.

    Args:
        frame: what calls.
        caller: the frame of ``nn.Module._call_impl`` of the module. If it is not among those that called
            ``frame``, its call has ended; if another module's is met first, the call is that module's.
    """
    origin = []
    while frame is not None and frame is not caller:
        code = frame.f_code
        if code is _MODULE_CALL:
            return None
        origin.append((code.co_name, code.co_firstlineno, frame.f_lasti))
        frame = frame.f_back
    return None if frame is None else tuple(origin)


@dataclass(frozen=True)
class Site:
    """One call of an operation in a forward.

    Attributes:
        inputs: for each simulated operand its position and keyword, and the simulator's name in the module.
        outputs: position of each simulated result, and the simulator's name.
        is_in_place: whether the operation writes its result into its first operand.
    """

    inputs: tuple[tuple[int, str, str], ...] = ()
    outputs: tuple[tuple[int, str], ...] = ()
    is_in_place: bool = False

    def run(
        self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the function, with simulators of ``module`` on its operands and results."""
        simulators: Any = module._modules
        target = args[0] if self.is_in_place else None
        if self.inputs:
            positional = list(args)
            for position, keyword, name in self.inputs:
                if position < len(positional):
                    positional[position] = simulators[name](positional[position])
                else:
                    kwargs = {**kwargs, keyword: simulators[name](kwargs[keyword])}
            args = tuple(positional)
        result = function(*args, **kwargs)
        for position, name in self.outputs:
            if isinstance(result, Tensor):
                result = simulators[name](result)
            else:
                results = list(result)
                results[position] = simulators[name](results[position])
                result = _like(result, results)
        if target is None or result is target:
            return result
        return target.copy_(result)


@dataclass(frozen=True)
class CallGroup:
    """The calls of one operation in a module's forward, in their order.

    Attributes:
        operation: the operation's name.
        slot: where a forward counts them.
        sites: what to do at each; None for nothing.
        positions: which of them are at a place in the source.
    """

    operation: str
    slot: int
    sites: tuple[Site | None, ...]
    positions: Mapping[Origin, tuple[int, ...]]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallGroup":
        return self  # names and positions only: true of a module's copy, too


def _like(original: Any, values: list[Any]) -> Any:
    """``values`` in a sequence of the type of ``original``, which may be one of torch's named tuples."""
    if isinstance(original, list):
        return values
    return type(original)(values) if type(original) is tuple else _named_tuple(original, values)


def _named_tuple(original: Any, values: list[Any]) -> Any:
    # collections.namedtuple takes the values one by one, torch's structseq takes them in one sequence.
    make = getattr(original, "_make", type(original))
    return make(values)
