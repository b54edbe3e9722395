"""The base of simulators."""

from abc import abstractmethod

import torch
from torch import nn

from coreai_opt._utils.registry_utils import ClassRegistryMixin

__all__ = ["CompressionSimulatorBase"]


class CompressionSimulatorBase(ClassRegistryMixin, nn.Module):
    """A module that maps a tensor to its compressed values, so that training takes compression in."""

    # Qualified name of the tensor, for messages. Who inserts the simulator into a model sets it.
    tensor_fqn: str = "<unknown>"

    @abstractmethod
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Compressed values of ``tensor``, of its shape and dtype, through which gradients flow."""
