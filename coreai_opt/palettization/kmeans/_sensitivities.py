"""How much the loss depends on each value of a weight: squared gradients over calibration data."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.palettization.kmeans._clustering import checked_sensitivities

__all__ = ["CalibrationHelper", "load_sensitivities", "sensitivity_of"]

logger = logging.getLogger(__name__)


class CalibrationHelper:
    """Sums the squared gradients of a loss: the diagonal of the empirical Fisher information.

    After a step the sum is also a parameter's ``grad``, until :meth:`close` puts back what was there before.
    Nothing waits for the device.

    Args:
        model: the model, without simulation.
        loss_fn: loss of the model's output and a target, a scalar.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        self.loss_fn = loss_fn
        self.step_called = False
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._sums: dict[str, Tensor] = {}
        self._before = {name: parameter.grad for name, parameter in self._parameters.items()}
        for parameter in self._parameters.values():
            parameter.grad = None

    def step(self, output: Any, target: Any) -> None:
        """Add the squared gradients of ``loss_fn(output, target)``.

        Args:
            output: what the model returned, with gradients.
            target: what the loss compares it with.

        Raises:
            RuntimeError: the loss does not depend on the model's parameters.
        """
        loss = self.loss_fn(output, target)
        gradients = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            if gradient is not None:
                square = gradient.detach().to(torch.float32).square()
                self._sums[name] = self._sums[name] + square if name in self._sums else square
                # A copy: whoever writes into it does not change the sum.
                parameter.grad = self._sums[name].to(parameter.dtype, copy=True)
        self.step_called = True

    def close(self) -> None:
        """Give each parameter the gradient that it had before."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._before[name]

    def sensitivities(self) -> dict[str, Tensor]:
        """The sums by the parameter's name, scaled to a maximum of one.

        Zeros take the least positive value of their parameter, so that no value is without weight; a
        parameter of zeros takes ones.

        Raises:
            RuntimeError: there was no step.
            ValueError: a gradient was not finite.
        """
        if not self.step_called:
            raise RuntimeError(
                "calibration_mode saw no data: call step(output, target) at least once in its context"
            )
        for name, total in self._sums.items():
            _check(name, total)
        return {name: _scaled(total) for name, total in self._sums.items() if total.numel()}


def _scaled(total: Tensor) -> Tensor:
    least = torch.where(total > 0, total, torch.inf).min()
    positive = torch.where(total == 0, least, total)
    return torch.where(least < torch.inf, positive / positive.max(), 1.0)


def load_sensitivities(path: str | Path) -> dict[str, Tensor]:
    """The sensitivities in a file that ``save_sensitivities`` or ``calibration_mode`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: it holds something other than tensors by name.
        ValueError: it is damaged, or would run code; or a tensor has negative values, or values that are not
            finite.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets in a file that is none of torch's
        raise ValueError(f"{path} is damaged, or no file of tensors: {error}") from error
    if not isinstance(loaded, Mapping):
        raise TypeError(
            f"{path}: sensitivities must be a dict of tensors by parameter; got {type(loaded).__name__}"
        )
    for name, sensitivity in loaded.items():
        _check(name, sensitivity)
    return dict(loaded)


def sensitivity_of(name: str, shape: torch.Size, sensitivities: Mapping[str, Tensor]) -> Tensor | None:
    """The sensitivities of one parameter; None, with an error in the log, if there are none.

    Raises:
        ValueError: they have another shape than the parameter.
    """
    found = sensitivities.get(name)
    if found is None:
        logger.error(f"No sensitivities found for {name}: its values are clustered with equal weights")
        return None
    if found.shape != shape:
        raise ValueError(
            f"the sensitivities of {name} must have its shape, {tuple(shape)}; got {tuple(found.shape)}"
        )
    return found


def _check(name: str, sensitivity: Any) -> None:
    try:
        checked_sensitivities(sensitivity)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
