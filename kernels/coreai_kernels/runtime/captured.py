"""Captured calls: the fast path of an owner that calls the same operator again and again.

Host time decides small tensors: the dispatcher, its arguments and the reading of settings cost more than it
takes to quantize one. The first call of an operator goes the slow path and captures what it found: kernel
arguments for that kind of input, and one guard for the owner. A later call runs the kernel at once if the
guard holds; else it goes the slow path again. The guard compares:

- slots: entries of dictionaries, such as a module's buffers and its :class:`Generation`, that must hold the
  very same object, and the memory of those that are tensors;
- switches: tensors of one byte that must keep their value, read where they lie if that is the CPU's memory;
- hooks: dictionaries of hooks, which must keep their entries;
- classes, whose attributes must not have been assigned to;
- the input's device, dtype, shape and strides, and that no mode of torch is active that would have a say in
  the call.

On a GPU a switch is not read, which would be to wait for the device: it must not have been written, as its
version counter tells.

What happens to other owners and tensors does not matter. Captured calls exist for CPU tensors and, by the
kernels in CUDA C++, for CUDA tensors, beside the torch version that the package was built with;
``COREAI_FAST_PATH=0`` turns them off.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coreai_kernels import backends, native

__all__ = ["CapturedCalls", "Guarded", "capture", "fast_path_counts", "is_enabled", "reset_fast_path_counts"]

ENVIRONMENT = "COREAI_FAST_PATH"

# Takes a tensor; gives the operator's output with its gradient, or None where the slow path has to be taken.
CapturedCalls = Callable[[Tensor], Tensor | None]

_METHODS = {
    "fake_quantize_forward": "capture_simulation",
    "observe_and_fake_quantize_": "capture_step",
}

_captures = 0
_refused: Counter[str] = Counter()


@dataclass(frozen=True)
class Guarded:
    """What an owner's calls depend on, but for their inputs.

    Attributes:
        slots: dictionaries and keys whose values have to stay the same objects.
        switches: tensors of one byte that have to keep their values.
        hooks: dictionaries of hooks, by torch's numbers for them, that have to keep their entries.
        classes: classes whose attributes have to stay as they are.
    """

    slots: Sequence[tuple[Mapping[str, Any], str]]
    switches: Sequence[Tensor] = ()
    hooks: Sequence[Mapping[Any, Any]] = ()
    classes: Sequence[type] = ()


def is_enabled() -> bool:
    """Whether calls are captured: not switched off, and the library for it is there."""
    return _is_enabled


def _read_environment() -> bool:
    value = os.environ.get(ENVIRONMENT, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{ENVIRONMENT} must be 0 or 1; got {value!r}")
    return value == "1"


_is_enabled = _read_environment() and native.autograd is not None and native.extension is not None


def capture(
    calls: Any,
    guarded: Callable[[], Guarded],
    operator: str,
    input: Tensor,
    args: tuple[Any, ...],
) -> CapturedCalls | None:
    """Capture a call of an operator.

    Args:
        calls: what this function has returned for the same owner before, or None.
        guarded: what the owner's calls depend on; asked for unless ``calls`` can be added to.
        operator: ``fake_quantize_forward`` or ``observe_and_fake_quantize_``.
        input: a tensor of the kind that will come again.
        args: the operator's arguments between the input and ``with_mask``.

    Returns:
        The captured calls of the owner; None where there can be none: for large CPU tensors, float64, devices
        without such kernels, block parameters of other dtypes than the kernels take or in another order than
        the blocks, and where the fast path is off.
    """
    global _captures
    if not _is_enabled:
        return None
    if backends.forced() not in (None, "native"):
        _refused["backend"] += 1
        return None
    if not native.autograd.can_capture(input):  # type: ignore[union-attr]
        _refused["device"] += 1
        return None
    if calls is None or not calls.is_valid():
        found = guarded()
        slots = [*found.slots, (vars(backends), "_forced")]
        calls = native.autograd.CapturedCalls(  # type: ignore[union-attr]
            slots, list(found.switches), list(found.hooks), list(found.classes)
        )
    if not getattr(calls, _METHODS[operator])(input, *args):
        _refused["tensor"] += 1
        return None
    _captures += 1
    return calls  # type: ignore[no-any-return]


def fast_path_counts() -> dict[str, Any]:
    """How calls have gone since the process began or :func:`reset_fast_path_counts`.

    Returns:
        ``enabled``; ``captures``, the calls captured; ``refused``, calls that could not be captured, by
        reason (``backend`` forced, ``device``, ``tensor``: its size, dtype, layout or state); ``hits``, calls
        run from their capture; ``misses``, calls whose owner had captured calls but which went the slow path,
        by reason: ``input`` (another dtype, shape, layout or kind of tensor), ``mode`` (of torch), ``state``
        (a buffer or setting was assigned), ``memory`` (a buffer's values lie elsewhere), ``switch``,
        ``hook``, ``class``.
    """
    counts = native.autograd.counts() if native.autograd is not None else {"hits": 0, "misses": {}}
    return {"enabled": _is_enabled, "captures": _captures, "refused": dict(_refused), **counts}


def reset_fast_path_counts() -> None:
    """Set all counts of :func:`fast_path_counts` to zero."""
    global _captures
    _captures = 0
    _refused.clear()
    if native.autograd is not None:
        native.autograd.reset_counts()
