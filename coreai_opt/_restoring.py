"""Contexts after which a model is as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["side_effects_undone", "training_flags", "undone_on_failure"]


@contextmanager
def training_flags(model: nn.Module, training: bool) -> Iterator[None]:
    """``model.train(training)`` while it is active; afterwards each module is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@contextmanager
def side_effects_undone(model: nn.Module) -> Iterator[None]:
    """Afterwards, the buffers of ``model`` and torch's random generators are as they were."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer
                    # An expanded buffer cannot be written, so that it cannot have changed either.
                    if 0 not in buffer.stride():
                        buffer.copy_(before)


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """If the block raises, all modules have the class, attributes, submodules and hooks that they had before.

    Values written into tensors stay.
    """
    tables = (
        "_parameters",
        "_buffers",
        "_modules",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks",
        "_forward_hooks_always_called",
    )
    before = [
        (module, type(module), dict(module.__dict__), [dict(module.__dict__[table]) for table in tables])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes, contents in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, content in zip(tables, contents, strict=True):
                module.__dict__[table].clear()
                module.__dict__[table].update(content)
        raise
