"""RB sparsity: random masks whose probabilities are learned (Louizos et al., arXiv 1712.01312)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import coreai_kernels
from coreai_opt._sharding.layout import whole
from coreai_opt.controllers.algorithms.sparsity import (
    SparsityConfig,
    SparsityController,
    SparsityParams,
    SparsityStatistics,
)
from coreai_opt.controllers.core.api import CompressionLoss
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmBuilder
from coreai_opt.controllers.core.gradients import scaled_gradient, with_zero_gradients
from coreai_opt.controllers.core.masks import bake, install, installed, original
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.schedules.params import Schedule

__all__ = ["RBSparsityBuilder", "RBSparsityConfig", "RBSparsityController", "RBSparsityLoss"]

INITIAL_PROBABILITY = 0.99
_WIDTH = 0.05


@AlgorithmStatistics.register("rb_sparsity")
@dataclass(frozen=True)
class RBSparsityStatistics(SparsityStatistics):
    """See the base; an element counts as masked if evaluation masks it."""


class RBSparsityParams(SparsityParams):
    """Sparsity parameters; the schedule is exponential unless another is given."""

    schedule: Schedule = "exponential"


class RBSparsityConfig(SparsityConfig):
    """Configuration of RB sparsity. ``seed``: of the random masks; the same on all ranks."""

    algorithm: Literal["rb_sparsity"]
    seed: int = Field(default=0, ge=0, lt=2**31)
    params: RBSparsityParams = Field(default_factory=RBSparsityParams)


class RBSparsityMask(nn.Module):
    """Masks a weight at random in training, and by ``logit > 0`` in evaluation or once frozen.

    Args:
        weight: gives the logits their shape, memory format and device.
        seed: of its random numbers.
        gradient_factor: on the gradient of the logits.
    """

    draw: Tensor

    def __init__(self, weight: Tensor, seed: int, gradient_factor: float = 1.0) -> None:
        super().__init__()
        start = math.log(INITIAL_PROBABILITY / (1 - INITIAL_PROBABILITY))
        self.logits = nn.Parameter(torch.full_like(weight, start, dtype=torch.float32))
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.seed = seed
        self.gradient_factor = gradient_factor
        self.frozen = False

    def mask(self) -> Tensor:
        """The mask of evaluation, bool."""
        return whole(self.logits.detach()) > 0

    def trained_logits(self) -> Tensor:
        """The logits in float32, whatever the model was cast to, with their scaled gradient."""
        return scaled_gradient(whole(self.logits), self.gradient_factor).float()

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight. In training, each call draws anew."""
        if not self.training or self.frozen:
            masked = coreai_kernels.apply_mask(weight, self.mask().to(weight.dtype))
            return with_zero_gradients(masked, self.logits) if self.training else masked
        number = self.draw + 1  # a tensor of its own: the backward pass reads it, and the buffer moves on
        with torch.no_grad():
            self.draw.copy_(number)
        return coreai_kernels.sampled_mask(weight, self.trained_logits(), number, seed=self.seed)


class _KeptCount(torch.autograd.Function):
    """Number of positive logits, with the gradient that their sigmoids' sum has."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.count_nonzero(logits > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        return torch.ops.aten.sigmoid_backward(grad.expand_as(logits), logits.sigmoid())  # type: ignore[no-any-return]


class RBSparsityLoss(CompressionLoss):
    """``((share of the elements kept - (1 - level)) / 0.05)**2``, straight through the threshold.

    Global: of all elements together. Local: the mean over the layers of each one's. Zero once frozen.

    Args:
        masks: of the layers.
        local: whether each layer has the level.
    """

    def __init__(self, masks: Sequence[RBSparsityMask], local: bool) -> None:
        self._masks = masks
        self._local = local
        self.level = 0.0
        self.disabled = False

    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradient to the logits."""
        logits = [mask.trained_logits() for mask in self._masks]
        if self.disabled:
            return torch.zeros((), device=logits[0].device)
        kept = torch.stack([_KeptCount.apply(each) for each in logits])  # type: ignore[no-untyped-call]
        if self._local:
            sizes = kept.new_tensor([each.numel() for each in logits])
            return (((kept / sizes - (1 - self.level)) / _WIDTH) ** 2).mean()
        share = kept.sum() / sum(each.numel() for each in logits)
        return ((share - (1 - self.level)) / _WIDTH) ** 2


class RBSparsityController(SparsityController):
    """Moves the level that the loss asks for. Frozen, masks are those of evaluation, and the loss is zero."""

    _loss: RBSparsityLoss

    def __init__(
        self, target_model: nn.Module, config: RBSparsityConfig, steps_per_epoch: int | None = None
    ) -> None:
        super().__init__(target_model, config, steps_per_epoch)
        self._masks = installed(target_model, RBSparsityMask)
        local = config.params.sparsity_level_setting_mode == "local"
        self._loss = RBSparsityLoss(list(self._masks.values()), local)
        self._loss.level = config.sparsity_init

    def masks(self) -> dict[str, Tensor]:
        """See the base."""
        return {name: mask.mask() for name, mask in self._masks.items()}

    def _apply_level(self, level: float) -> None:
        self._loss.level = level

    def freeze(self) -> None:
        """See the base."""
        super().freeze()
        self._loss.disabled = True
        for mask in self._masks.values():
            mask.frozen = True

    def _load_algorithm_state(self, state: dict[str, Any]) -> None:
        super()._load_algorithm_state(state)
        self._loss.level = self._level
        if self._frozen:
            self.freeze()

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        return CompressionStatistics(
            rb_sparsity=self._statistics(RBSparsityStatistics, quickly_collected_only)
        )

    def strip_model(self, model: nn.Module) -> None:
        """Leave zeros in the weights where evaluation has them."""
        for mask in installed(model, RBSparsityMask).values():
            mask.eval()
        bake(model, (RBSparsityMask,))


@BaseCompressionAlgorithmBuilder.register("rb_sparsity")
class RBSparsityBuilder(BaseCompressionAlgorithmBuilder):
    """Builds random masks into convolutions and linear layers."""

    config_type = RBSparsityConfig
    order = 20

    def check(self, model: nn.Module) -> None:
        """See the base."""
        self.layers(model)

    def _apply_to(self, model: nn.Module) -> None:
        owners = Owners(model)
        for index, layer in enumerate(self.layers(model).values()):
            mask = RBSparsityMask(original(layer), (self.config.seed << 32) | index, self.gradient_factor)
            mask.train(layer.training)
            install(layer, mask, owners)
            with torch.no_grad():
                mask.draw.zero_()  # registering ran it once

    def build_controller(self, model: nn.Module) -> RBSparsityController:
        """See the base."""
        return RBSparsityController(model, self.config, self.context.init_args.steps_per_epoch)
