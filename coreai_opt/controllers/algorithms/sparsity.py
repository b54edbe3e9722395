"""What the sparsity algorithms have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from coreai_opt.common import ExportBackend
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import BaseCompressionAlgorithmController
from coreai_opt.controllers.core.config import AlgorithmConfig, BatchnormInitializer
from coreai_opt.controllers.core.lowering import LoweredWeight
from coreai_opt.controllers.core.masks import kept_per_mask, sparse_weights
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.schedules.of_simulators import scheduler_class_of
from coreai_opt.controllers.schedules.params import Schedule, ScheduleParams

__all__ = [
    "LayerSparsity",
    "SparsityConfig",
    "SparsityController",
    "SparsityParams",
    "SparsityStatistics",
    "sparsities",
]

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one weight: the share of its elements that are masked."""

    name: str
    shape: tuple[int, ...]
    sparsity: float


@dataclass(frozen=True)
class SparsityStatistics(AlgorithmStatistics):
    """Sparsity of the masked weights together and one by one.

    Fields:
        sparsity_of_masked_weights: masked elements ÷ elements of the weights that have a mask.
        sparsity_of_model: masked elements ÷ elements of all parameters.
        level: what the schedule asks for.
        target_level: what it will ask for.
        layers: the weights.
    """

    sparsity_of_masked_weights: float
    sparsity_of_model: float
    level: float
    target_level: float
    layers: list[LayerSparsity] = field(default_factory=list)


class SparsityParams(ScheduleParams):
    """Parameters of a sparsity schedule.

    Fields:
        sparsity_target, sparsity_target_epoch: the level at the end, and the epoch of the end.
        sparsity_freeze_epoch: epoch from which masks stay.
        sparsity_level_setting_mode: one threshold for all layers, or the level in each.
        multistep_sparsity_levels: one more than there are ``multistep_steps``.
    """

    schedule: Schedule = "polynomial"
    sparsity_target: float = Field(default=0.5, ge=0, le=1)
    sparsity_target_epoch: float = Field(default=90, ge=0)
    sparsity_freeze_epoch: float = Field(default=100, ge=0)
    sparsity_level_setting_mode: Literal["global", "local"] = "global"
    multistep_sparsity_levels: list[float] = Field(default_factory=lambda: [0.1, 0.5])

    @model_validator(mode="after")
    def _check_levels(self) -> "SparsityParams":
        if (
            self.schedule == "multistep"
            and len(self.multistep_sparsity_levels) != len(self.multistep_steps) + 1
        ):
            raise ValueError(
                f"multistep_sparsity_levels needs one level more than multistep_steps has epochs; got "
                f"{self.multistep_sparsity_levels} and {self.multistep_steps}"
            )
        return self

    @property
    def target_epoch(self) -> float:
        """See the base."""
        return self.sparsity_target_epoch

    @property
    def has_own_freeze_epoch(self) -> bool:
        """See the base."""
        return "sparsity_freeze_epoch" in self.model_fields_set

    @property
    def freeze_epoch(self) -> float:
        """See the base."""
        return self.sparsity_freeze_epoch

    def exponential_epochs(self) -> tuple[float, float]:
        """From epoch 0 to the target epoch."""
        return 0, self.sparsity_target_epoch

    def levels(self) -> list[float]:
        """See the base."""
        return self.multistep_sparsity_levels


class SparsityConfig(AlgorithmConfig):
    """Configuration of an algorithm that follows a sparsity level.

    Fields:
        sparsity_init: level at the start.
        initializer: ``{"batchnorm_adaptation": {"num_bn_adaptation_samples": ...}}``, if asked for.
        params: of the schedule.
    """

    sparsity_init: float = Field(default=0.0, ge=0, le=1)
    initializer: BatchnormInitializer = Field(default_factory=BatchnormInitializer)
    params: Any = Field(default_factory=SparsityParams)


class SparsityController(BaseCompressionAlgorithmController):
    """A controller whose compression rate is a sparsity level that a schedule moves.

    Args:
        target_model: the compressed model.
        config: the algorithm's configuration.
        steps_per_epoch: optimizer steps in an epoch, where known.
    """

    def __init__(self, target_model: nn.Module, config: SparsityConfig, steps_per_epoch: int | None) -> None:
        super().__init__(target_model)
        self.config = config
        self._level = config.sparsity_init
        self._frozen = False
        params = config.params
        target = params.levels()[-1] if params.schedule == "multistep" else params.sparsity_target
        self._target = float(target)
        scheduler_class = scheduler_class_of(params.schedule)
        self._scheduler = scheduler_class(self, self._level, self._target, params, steps_per_epoch)

    @abstractmethod
    def masks(self) -> dict[str, Tensor]:
        """The masks that inference has, by name of the layer."""

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """See the base."""
        return sparse_weights(model, self.masks())

    @abstractmethod
    def _apply_level(self, level: float) -> None:
        """Make the weights as sparse as ``level``, or ask for it, without waiting for the device."""

    @property
    def level(self) -> float:
        """The level asked for last."""
        return self._level

    @property
    def is_frozen(self) -> bool:
        """Whether the masks stay as they are."""
        return self._frozen

    def set_level(self, level: float) -> None:
        """Change the level, unless frozen."""
        if self._frozen:
            return
        self._level = level
        self._apply_level(level)

    def freeze(self) -> None:
        """Keep the masks from now on."""
        self._frozen = True

    def achieved_level(self) -> float:
        """The sparsity that inference has. Waits for the device."""
        masks = list(self.masks().values())
        return 1 - sum(kept_per_mask(masks)) / max(sum(mask.numel() for mask in masks), 1)

    def _get_compression_rate(self) -> float:
        return self._level

    def _set_compression_rate(self, compression_rate: float) -> None:
        frozen, self._frozen = self._frozen, False
        self.set_level(compression_rate)
        self._frozen = frozen

    def compression_stage(self) -> CompressionStage:
        """UNCOMPRESSED at level 0, FULLY_COMPRESSED at the target."""
        if self._level >= self._target - _TOLERANCE:
            return CompressionStage.FULLY_COMPRESSED
        if self._level <= 0:
            return CompressionStage.UNCOMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    def _get_algorithm_state(self) -> State:
        return {"level": float(self._level), "frozen": self._frozen}

    def _load_algorithm_state(self, state: State) -> None:
        self._level, self._frozen = state["level"], state["frozen"]

    def _statistics(self, kind: type[SparsityStatistics], quickly: bool) -> Any:
        layers, masked, model = sparsities({} if quickly else self.masks(), self._model)
        if quickly:
            masked, model = self._level, float("nan")
        return kind(masked, model, self._level, self._target, layers, left_whole=self.left_whole)

    @abstractmethod
    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""


def sparsities(masks: Mapping[str, Tensor], model: nn.Module) -> tuple[list[LayerSparsity], float, float]:
    """Sparsity of each mask, of all together, and of all parameters of the model."""
    kept = kept_per_mask(list(masks.values()))
    layers = [
        LayerSparsity(name, tuple(mask.shape), 1 - count / max(mask.numel(), 1))
        for (name, mask), count in zip(masks.items(), kept, strict=True)
    ]
    total = sum(mask.numel() for mask in masks.values())
    masked = total - sum(kept)
    everything = sum(parameter.numel() for parameter in model.parameters())
    return layers, masked / max(total, 1), masked / max(everything, 1)
