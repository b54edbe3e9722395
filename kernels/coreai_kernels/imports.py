"""What to do once a module of another package is there, without importing it.

The imports of torch's compiler and of torchao take longer than the first training steps of a small model, and
eager training needs neither. Who imports them gets what is due then.
"""

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

__all__ = ["assume_constant_result", "once_imported"]

F = TypeVar("F", bound=Callable[..., Any])
Action = Callable[[ModuleType], object]

# What waits outlives a reload of this module.
_waiting: dict[str, list[Action]] = globals().get("_waiting", {})
_lock = threading.Lock()


def once_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module of that name: now if it is imported, else right behind its import."""
    with _lock:
        _waiting.setdefault(name, []).append(action)
    # Looked at behind the line above: a thread that began to import it before that has no finder of ours.
    if name in sys.modules:
        _act(importlib.import_module(name))  # waits for a thread that is still importing it


def _act(module: ModuleType) -> None:
    with _lock:
        actions = _waiting.pop(module.__name__, [])
    for action in actions:
        action(module)


def assume_constant_result(function: F) -> F:
    """Return the function, which torch's compiler calls while it traces: the result is a constant to it.

    As ``torch.compiler.assume_constant_result``, which imports the compiler.
    """
    once_imported("torch._dynamo", lambda dynamo: dynamo.assume_constant_result(function))
    return function


class _Finder(MetaPathFinder):
    """Has others find the modules that are waited for, and their loaders call the actions."""

    def __init__(self) -> None:
        self._looking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # It is asked by itself where somebody has put a finder of theirs around each one.
        if fullname not in _waiting or getattr(self._looking, "now", False):
            return None
        self._looking.now = True
        try:
            spec = self._others_spec(fullname, path, target)
        finally:
            self._looking.now = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _act(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _others_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            # Python passes over finders without the method, too.
            find = getattr(finder, "find_spec", None)
            spec = None if find is None or finder is self else find(fullname, path, target)
            if spec is not None:
                return spec  # type: ignore[no-any-return]
        return None


sys.meta_path.insert(0, _Finder())
