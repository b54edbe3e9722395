"""Hooks that can be taken off a copy of the module they were put on."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["remove_hooks"]


def remove_hooks(module: nn.Module, is_ours: Callable[[Any], bool]) -> None:
    """Remove the forward hooks and forward pre-hooks for which ``is_ours`` holds.

    torch removes a hook by the handle that registering gave, which a deep copy of the module does not have.
    """
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            del hooks[key]
            for options in (
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
            ):
                options.pop(key, None)
