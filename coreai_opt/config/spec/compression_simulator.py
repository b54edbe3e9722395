"""The base of simulators."""

import threading
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from coreai_opt._utils.registry_utils import ClassRegistryMixin

__all__ = ["CompressionSimulatorBase", "is_simulating"]

_has_function_mode = torch._C._len_torch_function_stack


class _Running(threading.local):
    """How many simulators the current thread is inside of, while a torch function mode is active."""

    simulators = 0


_running = _Running()


def is_simulating() -> bool:
    """Whether the current thread runs a simulator: the functions called now are none of the model's own."""
    return _running.simulators > 0


class CompressionSimulatorBase(ClassRegistryMixin, nn.Module):
    """A module that maps a tensor to its compressed values, so that training takes compression in."""

    # Qualified name of the tensor, for messages. Who inserts the simulator into a model sets it.
    tensor_fqn: str = "<unknown>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module. Modes that count the model's calls can tell by :func:`is_simulating`."""
        if not _has_function_mode():
            return nn.Module.__call__(self, *args, **kwargs)
        _running.simulators += 1
        try:
            return nn.Module.__call__(self, *args, **kwargs)
        finally:
            _running.simulators -= 1

    @abstractmethod
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Compressed values of ``tensor``, of its shape and dtype, through which gradients flow."""
