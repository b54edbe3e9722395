"""Magnitude sparsity: the smallest weights are masked."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import coreai_kernels
from coreai_opt._sharding.layout import is_sharded, with_local
from coreai_opt._sharding.masks import whole_mask
from coreai_opt._sharding.selecting import topk_masks
from coreai_opt.controllers.algorithms.sparsity import (
    SparsityConfig,
    SparsityController,
    SparsityParams,
    SparsityStatistics,
)
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmBuilder
from coreai_opt.controllers.core.batchnorm import adapt_batchnorm
from coreai_opt.controllers.core.masks import BinaryMask, bake, install, installed, keep_counts, original
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics

__all__ = ["MagnitudeSparsityBuilder", "MagnitudeSparsityConfig", "MagnitudeSparsityController"]


@AlgorithmStatistics.register("magnitude_sparsity")
@dataclass(frozen=True)
class MagnitudeSparsityStatistics(SparsityStatistics):
    """See the base."""


class MagnitudeSparsityParams(SparsityParams):
    """Adds ``weight_importance``: ``abs``, or ``normed_abs``, relative to the layer's 2-norm."""

    weight_importance: Literal["normed_abs", "abs"] = "normed_abs"


class MagnitudeSparsityConfig(SparsityConfig):
    """Configuration of magnitude sparsity."""

    params: MagnitudeSparsityParams = Field(default_factory=MagnitudeSparsityParams)


class MagnitudeSparsityMask(BinaryMask):
    """The mask of one weight."""


class MagnitudeSparsityController(SparsityController):
    """Keeps the elements of greatest importance: exactly as many as the level leaves, ties by position."""

    config: MagnitudeSparsityConfig

    def __init__(
        self, target_model: nn.Module, config: MagnitudeSparsityConfig, steps_per_epoch: int | None = None
    ) -> None:
        super().__init__(target_model, config, steps_per_epoch)
        self._masks = installed(target_model, MagnitudeSparsityMask)

    def masks(self) -> dict[str, Tensor]:
        """See the base."""
        return {name: mask.mask for name, mask in self._masks.items()}

    @torch.no_grad()
    def _apply_level(self, level: float) -> None:
        weights = [original(self._model.get_submodule(name)).detach() for name in self._masks]
        masks = [mask.mask for mask in self._masks.values()]
        if weights and all(is_sharded(weight) for weight in weights):
            new = self._masks_of_sharded(weights, level)
        elif self.config.params.sparsity_level_setting_mode == "local":
            counts = keep_counts((weight.numel() for weight in weights), level)
            new = [coreai_kernels.topk_mask(w, keep) for w, keep in zip(weights, counts, strict=True)]
        else:
            if self.config.params.weight_importance == "normed_abs":
                weights = [weight / _norm(weight) for weight in weights]
            (keep,) = keep_counts([sum(weight.numel() for weight in weights)], level)
            new = coreai_kernels.topk_masks(weights, keep)
        for mask, value in zip(masks, new, strict=True):
            mask.copy_(value)

    def _masks_of_sharded(self, weights: list[Tensor], level: float) -> list[Tensor]:
        """The same without bringing weights together: each rank ranks what it holds."""
        sizes = [weight.numel() for weight in weights]
        if self.config.params.sparsity_level_setting_mode == "local":
            groups = [([w], keep) for w, keep in zip(weights, keep_counts(sizes, level), strict=True)]
        else:
            if self.config.params.weight_importance == "normed_abs":
                weights = [weight / _norm(weight) for weight in weights]
            (keep,) = keep_counts([sum(sizes)], level)
            groups = [(weights, keep)]
        new = [mask for of_group in topk_masks(groups) for mask in of_group]
        return [whole_mask(with_local(weight, mask)) for weight, mask in zip(weights, new, strict=True)]

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        own = self._statistics(MagnitudeSparsityStatistics, quickly_collected_only)
        return CompressionStatistics(magnitude_sparsity=own)

    def strip_model(self, model: nn.Module) -> None:
        """Leave zeros in the weights."""
        bake(model, (MagnitudeSparsityMask,))


def _norm(weight: Tensor) -> Tensor:
    """2-norm, but not zero: a weight of zeros has no importance rather than an undefined one."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dtype=dtype)
    return norm.clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)


@BaseCompressionAlgorithmBuilder.register("magnitude_sparsity")
class MagnitudeSparsityBuilder(BaseCompressionAlgorithmBuilder):
    """Builds magnitude sparsity into convolutions and linear layers."""

    config_type = MagnitudeSparsityConfig
    order = 20

    def check(self, model: nn.Module) -> None:
        """See the base."""
        self.layers(model)

    def _apply_to(self, model: nn.Module) -> None:
        owners = Owners(model)
        for layer in self.layers(model).values():
            install(layer, MagnitudeSparsityMask(original(layer)), owners)

    def _initialize(self, model: nn.Module) -> None:
        """Mask to the initial level: algorithms that are built in later see masked weights."""
        if self.config.sparsity_init > 0:
            self.build_controller(model).set_level(self.config.sparsity_init)
        adapt_batchnorm(model, self.context, self.config.initializer.samples)

    def build_controller(self, model: nn.Module) -> MagnitudeSparsityController:
        """See the base."""
        return MagnitudeSparsityController(model, self.config, self.context.init_args.steps_per_epoch)
