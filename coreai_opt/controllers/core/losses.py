"""Compression losses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.controllers.core.api import CompressionLoss, State
from coreai_opt.controllers.core.state import take

__all__ = ["CompositeCompressionLoss", "ZeroCompressionLoss", "device_of"]


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


class ZeroCompressionLoss(CompressionLoss):
    """No loss: a 0-d zero on the model's device.

    Args:
        model: tells the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zero."""
        return torch.zeros((), device=device_of(self._model))


class CompositeCompressionLoss(CompressionLoss):
    """The sum of the losses of several algorithms.

    Args:
        losses: at least one.
    """

    def __init__(self, losses: Sequence[CompressionLoss]) -> None:
        self.losses = tuple(losses)

    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The sum, in the order of the algorithms."""
        first, *rest = (loss(*args, **kwargs) for loss in self.losses)
        for value in rest:
            first = first + value
        return first

    def get_state(self) -> State:
        """The states in the order of the losses."""
        return {"losses": [loss.get_state() for loss in self.losses]}

    def load_state(self, state: State) -> None:
        """Load them in the same order."""
        (states,) = take(state, "losses", of="the sum of compression losses")
        for loss, its in zip(self.losses, states, strict=True):
            loss.load_state(its)
