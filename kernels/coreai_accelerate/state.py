"""What the plugin has replaced in Apple's package, and what it left to Apple's methods."""

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from coreai_kernels import backends, native
from coreai_kernels.runtime import fast_path_counts

__all__ = ["STATE", "Replacement", "Status", "TorchaoReport", "fall_back", "has_kernels"]


@dataclass
class Replacement:
    """One name of Apple's package that the plugin rebinds: an entry of a registry or of a module.

    Attributes:
        what: its name, for :func:`coreai_accelerate.status`.
        owner: the registry or namespace.
        key: the entry.
        value: what it becomes.
        old_key: another key that keeps the old value, for specifications that name its class.
    """

    what: str
    owner: MutableMapping[str, Any]
    key: str
    value: Any
    old_key: str | None = None
    _old: Any = None

    def apply(self) -> None:
        """Rebind."""
        self._old = self.owner[self.key]
        self.owner[self.key] = self.value
        if self.old_key is not None:
            self.owner[self.old_key] = self._old

    def undo(self) -> None:
        """Bind what was bound before."""
        self.owner[self.key] = self._old
        if self.old_key is not None:
            del self.owner[self.old_key]


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
    return not tensor.is_cpu or native.extension is not None or backends.forced() is not None


def fall_back(reason: str) -> None:
    """Count a call that goes to Apple's method."""
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
        fallbacks: calls that went to Apple's method since the process began, by reason.
        fast_path: :func:`coreai_kernels.runtime.fast_path_counts`.
    """

    is_active: bool
    replaced: tuple[str, ...]
    fallbacks: dict[str, int]
    fast_path: dict[str, Any]

    @classmethod
    def now(cls) -> "Status":
        """The current one."""
        replaced = tuple(each.what for each in STATE.replacements)
        return cls(STATE.is_active, replaced, dict(STATE.fallbacks), fast_path_counts())
