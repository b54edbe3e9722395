"""Changes of a model that are taken back when an error ends them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["undone_on_error"]


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Let modules, parameters, buffers and hooks of ``model`` be as before if the block raises."""
    modules: list[tuple[nn.Module, type, dict[str, Any]]] = [
        (module, type(module), {name: _shallow(value) for name, value in vars(module).items()})
        for module in model.modules()
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        for module, kind, members in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(members)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        raise


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value
