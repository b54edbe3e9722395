"""Movement sparsity: weights that training moves towards zero are masked (Sanh et al., arXiv 2005.07683)."""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import coreai_kernels
from coreai_opt.controllers import schedules
from coreai_opt.controllers.api import CompressionLoss, CompressionStage, State
from coreai_opt.controllers.base import BaseCompressionAlgorithmBuilder, BaseCompressionAlgorithmController
from coreai_opt.controllers.config import AlgorithmConfig, ConfigModel
from coreai_opt.controllers.masks import bake, install, installed, kept_per_mask, original, sparsities
from coreai_opt.controllers.schedulers import BaseCompressionScheduler
from coreai_opt.controllers.scopes import select_layers
from coreai_opt.controllers.statistics import CompressionStatistics, MovementSparsityStatistics

__all__ = ["MovementSparsityBuilder", "MovementSparsityConfig", "MovementSparsityController"]


class MovementSparsityParams(ConfigModel):
    """Parameters of movement sparsity.

    Fields:
        warmup_start_epoch, warmup_end_epoch: between them the threshold rises; then the masks are fixed.
        importance_regularization_factor: factor on the loss.
        init_importance_threshold, final_importance_threshold: of the polynomial.
        power: of the polynomial.
        steps_per_epoch: optimizer steps in an epoch.
    """

    warmup_start_epoch: int = Field(ge=0)
    warmup_end_epoch: int = Field(ge=1)
    importance_regularization_factor: float = Field(ge=0)
    init_importance_threshold: float = -1.0
    final_importance_threshold: float = 0.0
    power: float = Field(default=3.0, gt=0)
    steps_per_epoch: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> "MovementSparsityParams":
        if self.warmup_end_epoch <= self.warmup_start_epoch:
            raise ValueError(
                f"warmup_end_epoch must come after warmup_start_epoch; got {self.warmup_end_epoch} and "
                f"{self.warmup_start_epoch}"
            )
        if self.final_importance_threshold < self.init_importance_threshold:
            raise ValueError(
                f"final_importance_threshold must not be below init_importance_threshold; got "
                f"{self.final_importance_threshold} and {self.init_importance_threshold}"
            )
        return self


class MovementSparsityConfig(AlgorithmConfig):
    """Configuration of movement sparsity."""

    algorithm: Literal["movement_sparsity"]
    params: MovementSparsityParams


class _Threshold(torch.autograd.Function):
    """``1[scores > threshold]``, whose gradient passes to the scores."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class MovementMask(nn.Module):
    """Masks a weight by importance scores that are trained with it.

    Args:
        weight: gives the scores their shape, memory format and device; they begin at zero.
    """

    threshold: Tensor
    fixed_mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.register_buffer("threshold", torch.full((), -1.0, device=weight.device))
        self.register_buffer("fixed_mask", torch.ones_like(weight, requires_grad=False))
        self.frozen = False

    def mask(self) -> Tensor:
        """The current mask."""
        return self.fixed_mask if self.frozen else self.scores.detach() > self.threshold

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        if self.frozen:
            return coreai_kernels.apply_mask(weight, self.fixed_mask)
        mask = _Threshold.apply(self.scores, self.threshold)  # type: ignore[no-untyped-call]
        return weight * mask.to(weight.dtype)


class MovementSparsityLoss(CompressionLoss):
    """``factor * share of the way * mean of sigmoid(scores)``; zero before warm-up and once frozen."""

    def __init__(self, masks: list[MovementMask], factor: float) -> None:
        self._masks = masks
        self._factor = factor
        self.progress = 0.0
        self.disabled = False

    def calculate(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradient to the scores."""
        device = self._masks[0].scores.device
        if self.disabled or self.progress <= 0:
            return torch.zeros((), device=device)
        total = torch.zeros((), device=device)
        for mask in self._masks:
            total = total + mask.scores.sigmoid().sum()
        return self._factor * self.progress * total / sum(mask.scores.numel() for mask in self._masks)


class MovementScheduler(BaseCompressionScheduler):
    """Raises the threshold at each step of the warm-up, then fixes the masks.

    Args:
        controller: of the algorithm.
        params: its parameters.
        steps_per_epoch: optimizer steps in an epoch, if the parameters do not give it.

    Raises:
        ValueError: nobody told how many steps an epoch has.
    """

    def __init__(
        self,
        controller: "MovementSparsityController",
        params: MovementSparsityParams,
        steps_per_epoch: int | None,
    ) -> None:
        super().__init__(params.steps_per_epoch or steps_per_epoch)
        if not self._steps_per_epoch:
            raise ValueError(
                "movement_sparsity needs the number of steps in an epoch: give steps_per_epoch in its "
                "params, or register a data loader with register_default_init_args"
            )
        self.controller = controller
        self.params = params

    def progress_at(self, epoch: int, step: int = 0) -> float:
        """Share of the warm-up that is over."""
        start, end = self.params.warmup_start_epoch, self.params.warmup_end_epoch
        within = min(step / (self._steps_per_epoch or 1), 1.0)
        return schedules.share_of(epoch + within - start, end - start)

    def threshold_at(self, epoch: int, step: int = 0) -> float:
        """The polynomial's threshold; minus infinity before the warm-up."""
        if epoch < self.params.warmup_start_epoch:
            return float("-inf")
        first, last = self.params.init_importance_threshold, self.params.final_importance_threshold
        return schedules.polynomial(self.progress_at(epoch, step), first, last, self.params.power)

    def step(self, next: int | None = None) -> None:
        """See the base."""
        super().step(next)
        self._apply()

    def epoch_step(self, next: int | None = None) -> None:
        """See the base."""
        super().epoch_step(next)
        self._apply()

    def _apply(self) -> None:
        epoch, step = self.current_epoch, max(self.step_in_epoch, 0)
        if epoch >= self.params.warmup_end_epoch:
            self.controller.freeze()
        elif epoch >= 0:
            self.controller.set_threshold(self.threshold_at(epoch, step), self.progress_at(epoch, step))


class MovementSparsityController(BaseCompressionAlgorithmController):
    """Trains importance scores, masks what lies below a rising threshold, and fixes the masks after warm-up.

    Its rate is the share of masked elements, which training decides and nobody can set.
    """

    _loss: MovementSparsityLoss

    def __init__(
        self, target_model: nn.Module, config: MovementSparsityConfig, steps_per_epoch: int | None = None
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self._masks = installed(target_model, MovementMask)
        factor = config.params.importance_regularization_factor
        self._loss = MovementSparsityLoss(list(self._masks.values()), factor)
        self._scheduler = MovementScheduler(self, config.params, steps_per_epoch)
        self._frozen = False

    def masks(self) -> dict[str, Tensor]:
        """The masks by name of the layer."""
        return {name: mask.mask() for name, mask in self._masks.items()}

    @torch.no_grad()
    def set_threshold(self, threshold: float, progress: float) -> None:
        """Mask the scores up to ``threshold``; ``progress`` scales the loss. Nothing once frozen."""
        if self._frozen:
            return
        self._loss.progress = progress
        for mask in self._masks.values():
            mask.threshold.fill_(threshold)

    @torch.no_grad()
    def freeze(self) -> None:
        """Fix the masks at the final threshold: the scores have no effect any more, and no loss."""
        if self._frozen:
            return
        for mask in self._masks.values():
            mask.threshold.fill_(self.config.params.final_importance_threshold)
            mask.fixed_mask.copy_(mask.mask())
        self._set_frozen()

    def _set_frozen(self) -> None:
        self._frozen = True
        self._loss.disabled = True
        for mask in self._masks.values():
            mask.frozen = True

    def _get_compression_rate(self) -> float:
        masks = list(self.masks().values())
        return 1 - sum(kept_per_mask(masks)) / max(sum(mask.numel() for mask in masks), 1)

    def compression_stage(self) -> CompressionStage:
        """UNCOMPRESSED before the warm-up, FULLY_COMPRESSED after it."""
        if self._frozen:
            return CompressionStage.FULLY_COMPRESSED
        started = self._scheduler.current_epoch >= self.config.params.warmup_start_epoch
        return CompressionStage.PARTIALLY_COMPRESSED if started else CompressionStage.UNCOMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        layers, masked, model = sparsities(self.masks(), self._model)
        progress = 1.0 if self._frozen else self._loss.progress
        shown = [] if quickly_collected_only else layers
        own = MovementSparsityStatistics(masked, model, progress, 1.0, shown)
        return CompressionStatistics(movement_sparsity=own)

    def strip_model(self, model: nn.Module) -> None:
        """Leave zeros in the weights."""
        bake(model, (MovementMask,))

    def _get_algorithm_state(self) -> State:
        return {"frozen": self._frozen, "progress": self._loss.progress}

    def _load_algorithm_state(self, state: State) -> None:
        self._loss.progress = state["progress"]
        if state["frozen"]:
            self._set_frozen()


@BaseCompressionAlgorithmBuilder.register("movement_sparsity")
class MovementSparsityBuilder(BaseCompressionAlgorithmBuilder):
    """Builds importance scores into linear layers."""

    config_type = MovementSparsityConfig
    order = 20

    def check(self, model: nn.Module) -> None:
        """See the base."""
        select_layers(model, self.config, (nn.Linear,))

    def _apply_to(self, model: nn.Module) -> None:
        for layer in select_layers(model, self.config, (nn.Linear,)).values():
            mask = MovementMask(original(layer))
            mask.threshold.fill_(float("-inf"))
            install(layer, mask)
            self.scale_gradient(mask.scores)

    def build_controller(self, model: nn.Module) -> MovementSparsityController:
        """See the base."""
        return MovementSparsityController(model, self.config, self.context.init_args.steps_per_epoch)
