"""The exported program of a model, which is followed to see what belongs together."""

from typing import Any

import torch
from torch import nn

from coreai_opt.controllers.core.copies import copy_model
from coreai_opt.controllers.core.hooks import remove_hooks

__all__ = ["exported"]


def exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A copy of the model in evaluation mode without hooks, and its exported program.

    Caches of keys and values, which some language models return, stay off.

    Args:
        model: stays as it is.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.

    Raises:
        ValueError: the model cannot be exported.
    """
    plain = copy_model(model).eval()
    remove_hooks(plain, lambda hook: True)
    for module in plain.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            return plain, torch.export.export(plain, args, kwargs, strict=False)
    except Exception as error:
        raise ValueError(
            "the structures of the model are found in its exported program, and torch.export fails for it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
