"""States that are saved: primitives and tensors only."""

from typing import Any

from torch import Tensor

from coreai_opt.controllers.core.api import State

__all__ = ["check_plain", "take"]


def check_plain(value: Any, where: str = "state") -> Any:
    """``value`` itself, if ``torch.load(weights_only=True)`` can read it back.

    Raises:
        TypeError: somewhere in it is something else than numbers, strings, None, tensors, and lists, tuples
            and dicts of them. Subclasses such as enumerations count as something else.
    """
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return value
    if type(value) is dict:
        for key, entry in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; use str or int")
            check_plain(entry, f"{where}[{key!r}]")
        return value
    if type(value) in (list, tuple):
        for index, entry in enumerate(value):
            check_plain(entry, f"{where}[{index}]")
        return value
    raise TypeError(
        f"{where} is a {type(value).__name__}; a state holds numbers, strings, None, tensors, and lists, "
        f"tuples and dicts of them"
    )


def take(state: State, *keys: str, of: str) -> list[Any]:
    """The entries of ``state`` under ``keys``.

    Raises:
        KeyError: one is missing; the message names it and ``of``.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise KeyError(f"the state of {of} lacks {missing}; it has {sorted(map(str, state))}")
    return [state[key] for key in keys]
