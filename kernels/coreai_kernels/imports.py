"""What to do once a module of another package is there, without importing it.

The imports of torch's compiler and of torchao take longer than the first training steps of a small model, and
eager training needs neither. Who imports them gets what is due then.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

__all__ = ["assume_constant_result", "once_imported"]

F = TypeVar("F", bound=Callable[..., Any])
Action = Callable[[ModuleType], object]

_waiting: dict[str, list[Action]] = {}


def once_imported(name: str, action: Action) -> None:
    """Call ``action`` with the module of that name: now if it is imported, else right behind its import."""
    if name in sys.modules:
        action(importlib.import_module(name))  # waits for a thread that is still importing it
    else:
        _waiting.setdefault(name, []).append(action)


def assume_constant_result(function: F) -> F:
    """Return the function, which torch's compiler calls while it traces: the result is a constant to it.

    As ``torch.compiler.assume_constant_result``, which imports the compiler.
    """
    once_imported("torch._dynamo", lambda dynamo: dynamo.assume_constant_result(function))
    return function


class _Finder(MetaPathFinder):
    """Has others find the modules that are waited for, and their loaders call the actions."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in _waiting.pop(fullname, ()):
                    action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
