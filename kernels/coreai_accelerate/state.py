"""What the plugin has replaced in Apple's package, and what it left to Apple's methods."""

import copyreg
import functools
import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from coreai_kernels import backends, native
from coreai_kernels.runtime import fast_path_counts

__all__ = [
    "STATE",
    "PickledAs",
    "Replacement",
    "Status",
    "TorchaoReport",
    "fall_back",
    "has_kernels",
    "is_traced",
]


@dataclass(frozen=True)
class Replacement:
    """A class of Apple's package whose new instances are of a subclass of the plugin's.

    Where instances are made, not in a registry: configurations name Apple's class, with the plugin and
    without, and those made earlier, or read from a file, are served.

    Attributes:
        what: its name, for :func:`coreai_accelerate.status`.
        apple: the class.
        fused: the subclass.
    """

    what: str
    apple: type
    fused: type

    def apply(self) -> None:
        """From now on, calling Apple's class makes the subclass, while the plugin is active."""
        if self.apple in _HAVE_NEW:
            return
        # For good: Python does not forget that a class had a __new__.
        _HAVE_NEW.add(self.apple)
        apple, fused = self.apple, self.fused

        def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            made = fused if cls is apple and STATE.is_active else cls
            following = super(apple, cls).__new__  # type: ignore[misc]
            if following is object.__new__:
                return following(made)
            return following(made, *args, **kwargs)

        # The constructor's arguments stay visible to who asks the class for them.
        __new__.__signature__ = inspect.signature(apple.__init__)  # type: ignore[attr-defined, misc]
        apple.__new__ = staticmethod(__new__)  # type: ignore[assignment, method-assign]


_HAVE_NEW: set[type] = set()


class PickledAs:
    """The last base of a subclass, of which a pickle is one of the class that it takes the place of."""

    __slots__ = ()
    _pickled_as: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As by default, with the other class: it can be loaded without the plugin."""
        function, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if "_pickled_as" in vars(type(self)):  # else it is of a user's subclass
            # Not __newobj__ itself, which pickle allows for the object's own class alone.
            function, arguments = functools.partial(copyreg.__newobj__, self._pickled_as), ()  # type: ignore[attr-defined]
        return function, arguments, *state


@dataclass
class _State:
    is_active: bool = False
    replacements: list[Replacement] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    of_torchao: "WeakSet[nn.Module]" = field(default_factory=WeakSet)


STATE = _State()


def has_kernels(tensor: Tensor) -> bool:
    """Whether the engine has more than its definitions for the tensor, or is to use these.

    They are no faster than the methods that they would take the place of.
    """
    if backends.forced() is not None:
        return True
    return native.extension is not None if tensor.is_cpu else tensor.device.type != "mps"


def is_traced(tensor: Any) -> bool:
    """Whether a program is being recorded or transformed, in which values cannot be asked for."""
    return (
        type(tensor) not in (Tensor, nn.Parameter)
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def fall_back(reason: str) -> None:
    """Count a call that goes to Apple's method, or torchao's."""
    STATE.fallbacks[reason] += 1


@dataclass(frozen=True)
class TorchaoReport:
    """What :func:`coreai_accelerate.torchao` did with a model's simulators.

    Attributes:
        replaced: names of the simulators that run on the engine.
        left: names of the others, and why.
    """

    replaced: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """A look at the plugin.

    Attributes:
        is_active: whether Apple's package runs on the engine.
        replaced: what is replaced.
        torchao: how many of torchao's simulators run on the engine.
        fallbacks: calls that went to Apple's or torchao's method since the process began, by reason.
        fast_path: :func:`coreai_kernels.runtime.fast_path_counts`.
    """

    is_active: bool
    replaced: tuple[str, ...]
    torchao: int
    fallbacks: dict[str, int]
    fast_path: dict[str, Any]

    @classmethod
    def now(cls) -> "Status":
        """The current one."""
        replaced = tuple(each.what for each in STATE.replacements)
        return cls(
            STATE.is_active, replaced, len(STATE.of_torchao), dict(STATE.fallbacks), fast_path_counts()
        )
