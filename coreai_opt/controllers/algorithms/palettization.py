"""Palettization: weights of few distinct values, trained straight through."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt.common import ExportBackend
from coreai_opt.controllers.algorithms.palette_records import keep_palette, take_palette
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.config import AlgorithmConfig, ConfigModel
from coreai_opt.controllers.core.layers import channel_axis_of
from coreai_opt.controllers.core.lowering import LoweredWeight
from coreai_opt.controllers.core.masks import bake, install, installed, original, value_before
from coreai_opt.controllers.core.owners import Owners
from coreai_opt.controllers.core.schedulers import BaseCompressionScheduler, Change, place_of
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.palettization.config import PATSchedule
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize
from coreai_opt.palettization.spec import (
    PalettizationGranularity,
    PerGroupedChannelGranularity,
    PerTensorGranularity,
    StraightThroughTrainingSpec,
)

__all__ = ["JointPalette", "PalettizationBuilder", "PalettizationConfig", "PalettizationController"]


@dataclass(frozen=True)
class LayerPalette:
    """Palette of one weight."""

    name: str
    shape: tuple[int, ...]
    bits: int
    enabled: bool


@AlgorithmStatistics.register("palettization")
@dataclass(frozen=True)
class PalettizationStatistics(AlgorithmStatistics):
    """Palettized weights. ``compression_rate``: bits saved ÷ bits of the same weights before."""

    compression_rate: float
    layers: list[LayerPalette] = field(default_factory=list)


class PalettizationParams(ConfigModel):
    """When weights are palettized, and the steps between two refreshes of the palettes.

    Fields:
        palettization_start_epoch: the epoch from which weights are palettized.
        schedule: the palettizer's schedule, which counts optimizer steps, instead.
        refresh_interval: steps between two refreshes.
    """

    palettization_start_epoch: int = Field(default=0, ge=0)
    schedule: PATSchedule | None = None
    refresh_interval: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_start(self) -> "PalettizationParams":
        if self.schedule is not None and self.palettization_start_epoch:
            raise ValueError("palettization_start_epoch and schedule exclude each other: give one")
        return self

    @property
    def starts_at_once(self) -> bool:
        """Whether weights are palettized from the first step on."""
        first_step = 0 if self.schedule is None else self.schedule.enable_fake_palettize
        return not (self.palettization_start_epoch or first_step)


class PalettizationConfig(AlgorithmConfig):
    """Configuration of palettization.

    Fields:
        bits: of an index into a palette.
        group_size: output channels that share a palette; None for one palette a weight.
        per_channel_scale: cluster each channel relative to its largest magnitude.
    """

    algorithm: Literal["palettization"]
    bits: Literal[1, 2, 3, 4, 6, 8] = 4
    group_size: int | None = Field(default=None, ge=1)
    per_channel_scale: bool = False
    params: PalettizationParams = Field(default_factory=PalettizationParams)


class JointPalette(_KMeansFakePalettize):
    """Palettes of what is kept: a masked zero stays zero, and the palette is fitted to the other values.

    So do the zeros of a channel without other values, where channels have scales.

    Args:
        after_masks: whether masks come before.
        options: see the base.
    """

    def __init__(self, after_masks: bool, **options: Any) -> None:
        super().__init__(**options)
        self._after_masks = after_masks

    def _weigh(self, weight: Tensor) -> None:
        """Let clustering see the kept values alone; all, where nothing is kept."""
        if self._after_masks:
            kept = weight.detach() != 0
            self._sensitivities = torch.where(kept.any(), kept, True).to(weight.dtype)

    def ensure_initialized(self, tensor: Tensor) -> None:
        """See the base."""
        self._weigh(tensor)
        super().ensure_initialized(tensor)

    def refine(self, weight: Tensor, iterations: int) -> None:
        """See the base."""
        self._weigh(weight)
        super().refine(weight, iterations)

    def forward_enabled(self, tensor: Tensor) -> Tensor:
        """See the base."""
        palettized = super().forward_enabled(tensor)
        if self._after_masks:
            return palettized * (tensor != 0).to(palettized.dtype)
        if self.enable_per_channel_scale:
            rows = (tensor.detach().flatten(1) != 0).any(1)
            return palettized * rows.reshape(-1, *[1] * (tensor.dim() - 1)).to(palettized.dtype)
        return palettized


class PalettizationScheduler(BaseCompressionScheduler):
    """Switches palettes on at their epoch, and lets them follow the weights.

    Args:
        controller: of the algorithm.
    """

    def __init__(self, controller: "PalettizationController") -> None:
        super().__init__()
        self.controller = controller

    def planned(self, epochs: int, steps_per_epoch: int | None) -> list[Change]:
        """When weights begin to be palettized."""
        params = self.controller.config.params
        start = (params.palettization_start_epoch, 0)
        if params.schedule is not None:
            start = place_of(params.schedule.enable_fake_palettize, steps_per_epoch)
        return [(*start, "weights palettized", None)] if start[0] < epochs else []

    def step(self, next: int | None = None) -> None:
        """See the base."""
        super().step(next)
        schedule = self.controller.config.params.schedule
        if schedule is not None and self.current_step >= schedule.enable_fake_palettize:
            self.controller.switch_on()
        self.controller.refresh(self.current_step)

    def epoch_step(self, next: int | None = None) -> None:
        """See the base."""
        super().epoch_step(next)
        params = self.controller.config.params
        if params.schedule is None and self.current_epoch >= params.palettization_start_epoch:
            self.controller.switch_on()


class PalettizationController(BaseCompressionAlgorithmController):
    """Simulates palettized weights. Its rate is the share of their bits that is saved, palettes included."""

    def __init__(self, target_model: nn.Module, config: PalettizationConfig) -> None:
        super().__init__(target_model)
        self.config = config
        self._simulators = installed(target_model, JointPalette)
        self._scheduler = PalettizationScheduler(self)
        self._on = config.params.starts_at_once

    def switch_on(self) -> None:
        """Palettize from now on."""
        if self._on:
            return
        self._on = True
        for name, simulator in self._simulators.items():
            simulator.enable_fake_palett(True, reinitialize=True)
            simulator.ensure_initialized(self._incoming(name))

    def refresh(self, step: int) -> None:
        """Let the palettes follow the weights, at the steps that the configuration says."""
        if not self._on or step <= 0:
            return
        for name, simulator in self._simulators.items():
            simulator.step(self._incoming(name), step)

    def _incoming(self, name: str) -> Tensor:
        """A weight as other algorithms hand it to the palettes."""
        return value_before(self._model.get_submodule(name), JointPalette)

    def _get_compression_rate(self) -> float:
        saved = full = 0
        for name, simulator in self._simulators.items():
            weight = original(self._model.get_submodule(name))
            bits = 8 * weight.element_size()
            full += bits * weight.numel()
            if self._on and simulator.centroids is not None:
                saved += (bits - self.config.bits) * weight.numel() - bits * simulator.centroids.numel()
        return max(saved / max(full, 1), 0.0)

    def compression_stage(self) -> CompressionStage:
        """FULLY_COMPRESSED once the weights are palettized."""
        return CompressionStage.FULLY_COMPRESSED if self._on else CompressionStage.UNCOMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        layers = [
            LayerPalette(
                name, tuple(original(self._model.get_submodule(name)).shape), self.config.bits, self._on
            )
            for name in self._simulators
        ]
        own = PalettizationStatistics(self.compression_rate, layers, left_whole=self.left_whole)
        return CompressionStatistics(palettization=own)

    def strip_model(self, model: nn.Module) -> None:
        """Leave palettized values in the weights."""
        for simulator in installed(model, JointPalette).values():
            simulator.eval()
        bake(model, (JointPalette,))

    def lower_model(self, model: nn.Module) -> None:
        """See the base. Tables stay in the layers: other algorithms may change the weights yet."""
        owners = Owners(model)
        kept = []
        for name, simulator in installed(model, JointPalette).items() if self._on else ():
            layer = model.get_submodule(name)
            simulator.eval()
            kept += [(owner, simulator, value_before(layer, JointPalette)) for owner in owners.of(layer)]
        self.strip_model(model)
        for (_, layer, _), simulator, weight in kept:
            keep_palette(layer, simulator, weight)

    def lowered_weights(self, model: nn.Module, backend: ExportBackend) -> Iterator[LoweredWeight]:
        """See the base."""
        for path, module in model.named_modules():
            record = take_palette(module, f"{path}.weight")
            if record is not None:
                yield LoweredWeight(f"{path}.weight", module, "weight", record)

    def _get_algorithm_state(self) -> State:
        return {"on": self._on}

    def _load_algorithm_state(self, state: State) -> None:
        self._on = state["on"]


@BaseCompressionAlgorithmBuilder.register("palettization")
class PalettizationBuilder(BaseCompressionAlgorithmBuilder):
    """Palettizes the weights of convolutions and linear layers."""

    config_type = PalettizationConfig
    order = 70

    def check(self, model: nn.Module) -> None:
        """See the base."""
        group = self.config.group_size
        for name, layer in self.layers(model).items():
            channels = original(layer).shape[channel_axis_of(layer)]
            if group is not None and channels % group:
                raise ValueError(
                    f"group_size {group} does not divide the {channels} output channels of {name!r}"
                )

    def _apply_to(self, model: nn.Module) -> None:
        config = self.config
        training = StraightThroughTrainingSpec(refresh_interval=config.params.refresh_interval)
        owners = Owners(model)
        for name, layer in self.layers(model).items():
            granularity: Any = PerTensorGranularity()
            if config.group_size is not None:
                axis = channel_axis_of(layer)
                granularity = PerGroupedChannelGranularity(axis=axis, group_size=config.group_size)
            masked = parametrize.is_parametrized(layer, "weight")
            simulator = self._simulator(masked, granularity, training).to(original(layer).device)
            simulator.tensor_fqn = f"{name}.weight"
            simulator.enable_fake_palett(config.params.starts_at_once)
            install(layer, simulator, owners)

    def _simulator(
        self, masked: bool, granularity: PalettizationGranularity, training: StraightThroughTrainingSpec
    ) -> JointPalette:
        return JointPalette(
            masked,
            n_bits=self.config.bits,
            lut_qspec=None,
            granularity=granularity,
            cluster_dim=1,
            enable_per_channel_scale=self.config.per_channel_scale,
            enable_fast_kmeans_mode=False,
            training_strategy_spec=training,
        )

    def _initialize(self, model: nn.Module) -> None:
        if not self.config.params.starts_at_once:
            return
        with torch.no_grad():
            for name, simulator in installed(model, JointPalette).items():
                simulator.ensure_initialized(value_before(model.get_submodule(name), JointPalette))

    def build_controller(self, model: nn.Module) -> PalettizationController:
        """See the base."""
        return PalettizationController(model, self.config)
