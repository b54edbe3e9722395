"""Constant sparsity: the zeros that a model has stay zeros."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from coreai_opt._sharding.layout import whole
from coreai_opt.common import ExportBackend
from coreai_opt.controllers.algorithms.sparsity import SparsityStatistics, sparsities
from coreai_opt.controllers.core.api import CompressionStage
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.config import AlgorithmConfig
from coreai_opt.controllers.core.lowering import LoweredWeight
from coreai_opt.controllers.core.masks import (
    BinaryMask,
    bake,
    install,
    installed,
    kept_per_mask,
    original,
    sparse_weights,
)
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics

__all__ = ["ConstSparsityBuilder", "ConstSparsityConfig", "ConstSparsityController"]


@AlgorithmStatistics.register("const_sparsity")
@dataclass(frozen=True)
class ConstSparsityStatistics(SparsityStatistics):
    """See the base."""


class ConstSparsityConfig(AlgorithmConfig):
    """Configuration of constant sparsity."""

    algorithm: Literal["const_sparsity"]


class ConstSparsityMask(BinaryMask):
    """The mask of one weight: where it was not zero."""


class ConstSparsityController(BaseCompressionAlgorithmController):
    """Nothing moves: its rate is the share of the masked weights that is zero."""

    def __init__(self, target_model: nn.Module) -> None:
        super().__init__(target_model)
        self._masks = installed(target_model, ConstSparsityMask)

    def masks(self) -> dict[str, Tensor]:
        """The masks by name of the layer."""
        return {name: mask.mask for name, mask in self._masks.items()}

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """See the base."""
        return sparse_weights(model, self.masks())

    def _get_compression_rate(self) -> float:
        masks = list(self.masks().values())
        return 1 - sum(kept_per_mask(masks)) / max(sum(mask.numel() for mask in masks), 1)

    def compression_stage(self) -> CompressionStage:
        """FULLY_COMPRESSED."""
        return CompressionStage.FULLY_COMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        layers, masked, model = sparsities(self.masks(), self._model)
        shown = [] if quickly_collected_only else layers
        own = ConstSparsityStatistics(masked, model, masked, masked, shown, left_whole=self.left_whole)
        return CompressionStatistics(const_sparsity=own)

    def strip_model(self, model: nn.Module) -> None:
        """Leave zeros in the weights."""
        bake(model, (ConstSparsityMask,))


@BaseCompressionAlgorithmBuilder.register("const_sparsity")
class ConstSparsityBuilder(BaseCompressionAlgorithmBuilder):
    """Masks the zeros of convolutions and linear layers."""

    config_type = ConstSparsityConfig
    order = 20

    def check(self, model: nn.Module) -> None:
        """See the base."""
        self.layers(model)

    def _apply_to(self, model: nn.Module) -> None:
        owners = Owners(model)
        for layer in self.layers(model).values():
            install(layer, ConstSparsityMask(original(layer)), owners)

    def _initialize(self, model: nn.Module) -> None:
        for name, mask in installed(model, ConstSparsityMask).items():
            mask.mask.copy_(whole(original(model.get_submodule(name)).detach()) != 0)

    def build_controller(self, model: nn.Module) -> ConstSparsityController:
        """See the base."""
        return ConstSparsityController(model)
