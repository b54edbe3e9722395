"""The optimizer of staged quantization: learning rate and weight decay follow the stages.

``StagedParams`` in a configuration's ``params`` say when activations and weights begin to be quantized; they
also give the learning rate and weight decay at the start, from when on the learning rate decays polynomially,
when weight decay ends, and how many batches make an optimizer step.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from coreai_opt.controllers.algorithms.quantization_config import StagedParams

__all__ = ["StagedWorker"]

_POWER = 0.9


class StagedWorker:
    """Steps an optimizer as staged quantization wants it.

    Call :meth:`epoch_step` before each epoch, and :meth:`step` after each ``backward``, instead of the
    optimizer's ``zero_grad`` and ``step``.

    Args:
        parameters: to train: those of the model.
        params: of the stages.
        steps_per_epoch: batches in an epoch.
        optimizer: None for Adam with ``base_lr`` (1e-3) and ``base_wd`` (0).

    Raises:
        ValueError: ``steps_per_epoch`` is not positive.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        params: StagedParams,
        steps_per_epoch: int,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be positive; got {steps_per_epoch}")
        self.params = params
        self.steps_per_epoch = steps_per_epoch
        base_lr = 1e-3 if params.base_lr is None else params.base_lr
        base_wd = 0.0 if params.base_wd is None else params.base_wd
        if optimizer is None:
            optimizer = torch.optim.Adam(parameters, lr=base_lr, weight_decay=base_wd)
        self.optimizer = optimizer
        self._base = [
            (
                base_lr if params.base_lr is not None else group["lr"],
                base_wd if params.base_wd is not None else group.get("weight_decay", 0.0),
            )
            for group in optimizer.param_groups
        ]
        self.epoch, self.batch = -1, 0
        self._waiting = 0
        optimizer.zero_grad()

    def learning_rate_factor(self, epoch: int, batch: int = 0) -> float:
        """What the learning rate at the start is multiplied by."""
        start = self.params.lr_poly_drop_start_epoch
        if start is None or epoch < start:
            return 1.0
        passed = (epoch - start + batch / self.steps_per_epoch) / self.params.lr_poly_drop_duration_epochs
        return max(1.0 - passed, 0.0) ** _POWER

    def _apply(self) -> None:
        factor = self.learning_rate_factor(max(self.epoch, 0), self.batch)
        ends = self.params.disable_wd_start_epoch
        decays = ends is None or self.epoch < ends
        for group, (lr, decay) in zip(self.optimizer.param_groups, self._base, strict=True):
            group["lr"] = lr * factor
            if "weight_decay" in group:
                group["weight_decay"] = decay if decays else 0.0

    def epoch_step(self, next: int | None = None) -> None:
        """Call before each epoch.

        Args:
            next: index of the epoch; None for the one after the current.
        """
        self.epoch = self.epoch + 1 if next is None else next
        self.batch = 0
        self._apply()

    def step(self) -> bool:
        """Call after each ``backward``; whether the optimizer made a step.

        Gradients of ``batch_multiplier`` batches are averaged.
        """
        self.batch += 1
        self._waiting += 1
        if self._waiting < self.params.batch_multiplier:
            return False
        if self._waiting > 1:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(self._waiting)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._waiting = 0
        self._apply()
        return True

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and the counters."""
        return {"optimizer": self.optimizer.state_dict(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, at the start of a batch group."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._waiting = 0
        self._apply()
