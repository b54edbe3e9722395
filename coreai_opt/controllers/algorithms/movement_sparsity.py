"""Movement sparsity: weights that training moves towards zero are masked (Sanh et al., arXiv 2005.07683)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from coreai_opt.common import ExportBackend
from coreai_opt.controllers.algorithms.movement_config import MovementSparsityConfig, MovementSparsityParams
from coreai_opt.controllers.algorithms.movement_masks import (
    MovementMask,
    MovementSparsityLoss,
    kept_units,
    resolve,
)
from coreai_opt.controllers.algorithms.sparsity import SparsityStatistics, sparsities
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.inputs import example_inputs
from coreai_opt.controllers.core.lowering import LoweredWeight
from coreai_opt.controllers.core.masks import (
    bake,
    install,
    installed,
    kept_per_mask,
    original,
    sparse_weights,
)
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler, Change
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.schedules import curves
from coreai_opt.controllers.structures.shrink import shrink_units
from coreai_opt.controllers.structures.units import Structure, find_structures

__all__ = ["MovementSparsityBuilder", "MovementSparsityConfig", "MovementSparsityController"]


@dataclass(frozen=True)
class SharedUnits:
    """Attention heads, or feed-forward dimensions, that the ``layers`` share."""

    layers: str
    units: int
    masked: int


@AlgorithmStatistics.register("movement_sparsity")
@dataclass(frozen=True)
class MovementSparsityStatistics(SparsityStatistics):
    """See the base; the levels are the threshold's progress from 0 to 1."""

    structures: list[SharedUnits] = field(default_factory=list)


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
        return curves.share_of(epoch + within - start, end - start)

    def threshold_at(self, epoch: int, step: int = 0) -> float:
        """The polynomial's threshold; minus infinity before the warm-up."""
        if epoch < self.params.warmup_start_epoch:
            return float("-inf")
        first, last = self.params.init_importance_threshold, self.params.final_importance_threshold
        return curves.polynomial(self.progress_at(epoch, step), first, last, self.params.power)

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """The progress of the warm-up at the epochs' beginnings, and its end."""
        start, end = self.params.warmup_start_epoch, self.params.warmup_end_epoch
        changes: list[Change] = [
            (epoch, 0, f"threshold {self.threshold_at(epoch):.4g}, progress", self.progress_at(epoch))
            for epoch in range(math.ceil(start), min(math.ceil(end), epochs))
        ]
        return [*changes, *([(math.ceil(end), 0, "masks fixed", 1.0)] if end < epochs else [])]

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

    Then attention heads and feed-forward dimensions are masked whole or not at all, unless
    ``enable_structured_masking`` is false; see :func:`.movement_masks.resolve`.

    Its rate is the share of masked elements, which training decides and nobody can set.
    """

    _loss: MovementSparsityLoss

    def __init__(
        self,
        target_model: nn.Module,
        config: MovementSparsityConfig,
        steps_per_epoch: int | None = None,
        structures: Sequence[Structure] = (),
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self.structures = tuple(structures)
        self._masks = installed(target_model, MovementMask)
        factor = config.params.importance_regularization_factor
        self._loss = MovementSparsityLoss(list(self._masks.values()), factor)
        self._scheduler = MovementScheduler(self, config.params, steps_per_epoch)
        self._frozen = False

    def masks(self) -> dict[str, Tensor]:
        """The masks by name of the layer."""
        return {name: mask.mask() for name, mask in self._masks.items()}

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """See the base."""
        return sparse_weights(model, self.masks())

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
        """Fix the masks at the final threshold, resolved: the scores have no effect any more, and no loss."""
        if self._frozen:
            return
        for mask in self._masks.values():
            mask.threshold.fill_(self.config.params.final_importance_threshold)
        for name, resolved in resolve(self.structures, self.masks()).items():
            self._masks[name].fixed_mask.copy_(resolved)
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
        units = [] if quickly_collected_only else self._units()
        own = MovementSparsityStatistics(
            masked, model, progress, 1.0, shown, units, left_whole=self.left_whole
        )
        return CompressionStatistics(movement_sparsity=own)

    def _kept(self) -> list[Tensor]:
        """Of each structure, which units are kept."""
        masks = {name: mask.bool() for name, mask in self.masks().items()}
        return [kept_units(structure, masks) for structure in self.structures]

    def _units(self) -> list[SharedUnits]:
        counts = kept_per_mask(self._kept())
        return [
            SharedUnits(", ".join((*each.rows, *each.columns)), each.units, each.units - kept)
            for each, kept in zip(self.structures, counts, strict=True)
        ]

    def strip_model(self, model: nn.Module) -> None:
        """Leave zeros in the weights. Once the masks are fixed, remove the masked units where that can be."""
        bake(model, (MovementMask,))
        if self._frozen:
            for structure, kept in zip(self.structures, self._kept(), strict=True):
                if structure.removable:
                    shrink_units(model, structure.rows, structure.columns, kept)

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
        """See the base. Looks for structures, too."""
        layers = self.layers(model, (nn.Linear,))
        self._factors = self.config.factors(model, layers)
        self._structures: list[Structure] = []
        if not self.config.params.enable_structured_masking:
            return
        if self._loaded is not None:
            self._structures = [Structure.from_state(each) for each in self._loaded["structures"]]
            return
        try:
            inputs = example_inputs(self.context, model)
            self._structures = find_structures(model, *inputs, set(layers))
        except ValueError as error:
            raise ValueError(f"{error}; or set enable_structured_masking to false") from error
        if not self._structures and "enable_structured_masking" in self.config.params.model_fields_set:
            raise ValueError(
                "enable_structured_masking is true, and movement_sparsity finds no attention heads or "
                "feed-forward dimensions: no two of its linear layers share features"
            )

    def _apply_to(self, model: nn.Module) -> None:
        if not hasattr(self, "_factors"):
            self.check(model)
        owners = Owners(model)
        for name, layer in self.layers(model, (nn.Linear,)).items():
            mask = MovementMask(original(layer), self._factors[name], self.gradient_factor)
            mask.threshold.fill_(float("-inf"))
            install(layer, mask, owners)

    def _get_state(self) -> State:
        return {"structures": [asdict(each) for each in self._structures]}

    def build_controller(self, model: nn.Module) -> MovementSparsityController:
        """See the base."""
        steps = self.context.init_args.steps_per_epoch
        return MovementSparsityController(model, self.config, steps, self._structures)
