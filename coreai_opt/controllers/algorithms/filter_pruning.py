"""Filter pruning: whole output channels of convolutions are masked, and removed in the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import coreai_kernels
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmBuilder,
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.config import AlgorithmConfig
from coreai_opt.controllers.core.inputs import example_inputs
from coreai_opt.controllers.core.layers import CONVOLUTIONS, channel_axis_of
from coreai_opt.controllers.core.masks import bake, install, original
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.schedules.levels import LevelScheduler
from coreai_opt.controllers.schedules.params import ScheduleParams
from coreai_opt.controllers.structures.channels import Cluster, Consumer, find_clusters
from coreai_opt.controllers.structures.flops import CostModel
from coreai_opt.controllers.structures.shrink import shrink

__all__ = ["FilterMask", "FilterPruningBuilder", "FilterPruningConfig", "FilterPruningController"]

MULTIPLE = 8
"""Kept filters are a multiple of this, rounded up: what matrix units like."""
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class LayerPruning:
    """Filters of one layer."""

    name: str
    filters: int
    pruned: int
    cluster: int


@AlgorithmStatistics.register("filter_pruning")
@dataclass(frozen=True)
class FilterPruningStatistics(AlgorithmStatistics):
    """Pruned filters, and what they save. A multiplication with an addition counts as two FLOPs."""

    pruning_level: float
    target_level: float
    share_of_filters: float
    flops: int
    full_flops: int
    parameters: int
    full_parameters: int
    layers: list[LayerPruning] = field(default_factory=list)


class FilterPruningParams(ScheduleParams):
    """Parameters of filter pruning.

    Fields:
        schedule: ``exponential``, ``exponential_with_bias`` or ``baseline``.
        pruning_target: share of the filters to prune.
        pruning_flops_target: share of the FLOPs to save, instead.
        num_init_steps, pruning_steps: epochs of warm-up, and of pruning.
        filter_importance: norm of a filter, or its distance to all others of its layer.
        all_weights: one ranking over all clusters, of importances relative to their cluster's norm.
        prune_first_conv: prune what reads the model's input.
        prune_downsample_convs: prune convolutions with strides.
    """

    schedule: Literal["exponential", "exponential_with_bias", "baseline"] = "exponential"
    pruning_target: float = Field(default=0.5, ge=0, le=1)
    pruning_flops_target: float | None = Field(default=None, ge=0, le=1)
    num_init_steps: int = Field(default=0, ge=0)
    pruning_steps: int = Field(default=100, ge=1)
    filter_importance: Literal["L1", "L2", "geometric_median"] = "L2"
    interlayer_ranking_type: Literal["unweighted_ranking"] = "unweighted_ranking"
    all_weights: bool = False
    prune_first_conv: bool = False
    prune_downsample_convs: bool = False

    @model_validator(mode="after")
    def _one_target(self) -> "FilterPruningParams":
        if self.pruning_flops_target is not None and "pruning_target" in self.model_fields_set:
            raise ValueError("pruning_target and pruning_flops_target exclude each other: give one")
        if self.all_weights and self.update_per_optimizer_step:
            raise ValueError(
                "update_per_optimizer_step excludes all_weights: a ranking over all layers waits for the "
                "device, and a step must not"
            )
        return self

    @property
    def freeze_epoch(self) -> float:
        """When warm-up and pruning are over."""
        return self.num_init_steps + self.pruning_steps

    def exponential_epochs(self) -> tuple[int, int]:
        """From the end of the warm-up; the target is reached in the last epoch of pruning."""
        return self.num_init_steps, self.pruning_steps - 1


class FilterPruningConfig(AlgorithmConfig):
    """Configuration of filter pruning."""

    algorithm: Literal["filter_pruning"]
    pruning_init: float = Field(default=0.0, ge=0, le=1)
    params: FilterPruningParams = Field(default_factory=FilterPruningParams)


class FilterMask(nn.Module):
    """Multiplies the channels of a parameter by zeros and ones.

    Args:
        channels: of the parameter.
        axis: where they lie.
        dims: of the parameter.
        device: of the mask.
    """

    mask: Tensor

    def __init__(self, channels: int, axis: int, dims: int, device: torch.device) -> None:
        super().__init__()
        self._view = [-1 if index == axis else 1 for index in range(dims)]
        self.register_buffer("mask", torch.ones(channels, device=device))

    def forward(self, tensor: Tensor) -> Tensor:
        """The masked parameter."""
        return tensor * self.mask.reshape(self._view).to(tensor.dtype)


def _tensors_of(layer: nn.Module) -> list[str]:
    return ["weight"] if getattr(layer, "bias", None) is None else ["weight", "bias"]


def _filter_mask(layer: nn.Module, tensor: str) -> FilterMask:
    chain: Any = layer.parametrizations[tensor]  # type: ignore[index, union-attr]
    return next(link for link in chain if isinstance(link, FilterMask))


class FilterPruningController(BaseCompressionAlgorithmController):
    """Prunes the least important filters, the same ones in all layers of a cluster.

    Its level is the share of filters, or of FLOPs, that the schedule asks for; its rate is the share that is
    gone, which rounding to multiples of 8 filters keeps below.
    """

    def __init__(
        self,
        target_model: nn.Module,
        config: FilterPruningConfig,
        clusters: Sequence[Cluster],
        consumers: Sequence[Consumer],
        costs: CostModel,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self.clusters = tuple(clusters)
        self._consumers = tuple(consumers)
        self._costs = costs
        self._level = config.pruning_init
        self._frozen = False
        self._kept = [cluster.size for cluster in clusters]
        params = config.params
        self._by_flops = params.pruning_flops_target is not None
        target = params.pruning_flops_target if self._by_flops else params.pruning_target
        self._target = float(target or 0.0)
        # Kept apart from the model, whose parametrizations another algorithm's strip may remove.
        self._masks = {
            (layer, tensor): _filter_mask(target_model.get_submodule(layer), tensor)
            for cluster in clusters
            for layer in (*cluster.producers, *cluster.followers)
            for tensor in _tensors_of(target_model.get_submodule(layer))
        }
        scheduler_class = LevelScheduler.resolve(params.schedule)
        self._scheduler = scheduler_class(self, config.pruning_init, self._target, params, steps_per_epoch)

    @property
    def level(self) -> float:
        """The level asked for last."""
        return self._level

    @property
    def maximal_compression_rate(self) -> float:
        """What pruning to the least number of filters saves."""
        return self._rate_of([min(MULTIPLE, cluster.size) for cluster in self.clusters])

    def _rate_of(self, kept: Sequence[int]) -> float:
        if self._by_flops:
            full = self._costs.costs([cluster.size for cluster in self.clusters])[0]
            return 1 - self._costs.costs(kept)[0] / full
        return 1 - sum(kept) / sum(cluster.size for cluster in self.clusters)

    def _get_compression_rate(self) -> float:
        return self._rate_of(self._kept)

    def _set_compression_rate(self, compression_rate: float) -> None:
        frozen, self._frozen = self._frozen, False
        self.set_level(compression_rate)
        self._frozen = frozen

    def freeze(self) -> None:
        """Keep the masks from now on."""
        self._frozen = True

    def achieved_level(self) -> float:
        """The share that is gone."""
        return self._get_compression_rate()

    @torch.no_grad()
    def set_level(self, level: float) -> None:
        """Prune anew to ``level``, unless frozen."""
        if self._frozen:
            return
        self._level = level
        importances = [self._importance(cluster) for cluster in self.clusters]
        # In all clusters together, how many of each are kept is known only after the ranking: on the host.
        ranking = self._ranking(importances) if self.config.params.all_weights else None
        self._kept = self._kept_for(level, ranking)
        for cluster, importance, kept in zip(self.clusters, importances, self._kept, strict=True):
            mask = coreai_kernels.topk_mask(importance, kept)
            for layer in (*cluster.producers, *cluster.followers):
                for tensor in ("weight", "bias"):
                    if (layer, tensor) in self._masks:
                        self._masks[layer, tensor].mask.copy_(mask)

    def _importance(self, cluster: Cluster) -> Tensor:
        """Of each channel: the sum over the cluster's convolutions."""
        total: Tensor | None = None
        for name in cluster.producers:
            layer = self._model.get_submodule(name)
            filters = original(layer).detach().float().movedim(channel_axis_of(layer), 0).flatten(1)
            if self.config.params.filter_importance == "geometric_median":
                own = torch.cdist(filters, filters).sum(1)
            else:
                order = 1 if self.config.params.filter_importance == "L1" else 2
                own = torch.linalg.vector_norm(filters, ord=order, dim=1)
            total = own if total is None else total + own
        assert total is not None  # a cluster has a producer
        return total

    def _ranking(self, importances: Sequence[Tensor]) -> list[int]:
        """The clusters of all filters, by ascending importance relative to the cluster's norm."""
        tiny = torch.finfo(torch.float32).tiny
        relative = torch.cat([each / torch.linalg.vector_norm(each).clamp(min=tiny) for each in importances])
        owners = [number for number, each in enumerate(importances) for _ in range(each.numel())]
        return [owners[index] for index in relative.argsort(stable=True).tolist()]

    def _kept_for(self, level: float, ranking: list[int] | None) -> list[int]:
        total = sum(cluster.size for cluster in self.clusters)
        if not self._by_flops:
            return self._kept_with(round(level * total) if ranking else level, ranking)
        # The least number of filters, or the least uniform level, that saves enough. Savings grow with both.
        low, high = 0, total
        while low < high:
            middle = (low + high) // 2
            kept = self._kept_with(middle if ranking else middle / total, ranking)
            if self._rate_of(kept) >= level - _TOLERANCE:
                high = middle
            else:
                low = middle + 1
        return self._kept_with(low if ranking else low / total, ranking)

    def _kept_with(self, amount: float, ranking: list[int] | None) -> list[int]:
        """Kept filters of each cluster, where ``amount`` is a share, or a number of the ranking's first."""
        sizes = [cluster.size for cluster in self.clusters]
        if ranking is None:
            wanted = [size * (1 - amount) for size in sizes]
        else:
            wanted = [float(size) for size in sizes]
            for number in ranking[: int(amount)]:
                wanted[number] -= 1
        return [
            min(size, max(MULTIPLE, MULTIPLE * math.ceil(each / MULTIPLE - _TOLERANCE)))
            for size, each in zip(sizes, wanted, strict=True)
        ]

    def masks(self) -> dict[str, Tensor]:
        """The masks by name of the convolution: one value a filter."""
        return {name: self._masks[name, "weight"].mask for each in self.clusters for name in each.producers}

    def compression_stage(self) -> CompressionStage:
        """UNCOMPRESSED at level 0, FULLY_COMPRESSED at the target."""
        if self._level >= self._target - _TOLERANCE:
            return CompressionStage.FULLY_COMPRESSED
        if self._level <= 0:
            return CompressionStage.UNCOMPRESSED
        return CompressionStage.PARTIALLY_COMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> CompressionStatistics:
        """See the base."""
        flops, parameters = self._costs.costs(self._kept)
        sizes = [cluster.size for cluster in self.clusters]
        full_flops, full_parameters = self._costs.costs(sizes)
        layers = [
            LayerPruning(name, cluster.size, cluster.size - kept, number)
            for number, (cluster, kept) in enumerate(zip(self.clusters, self._kept, strict=True))
            for name in cluster.producers
        ]
        own = FilterPruningStatistics(
            pruning_level=self._level,
            target_level=self._target,
            share_of_filters=1 - sum(self._kept) / sum(sizes),
            flops=flops,
            full_flops=full_flops,
            parameters=parameters,
            full_parameters=full_parameters,
            layers=layers,
            left_whole=self.left_whole,
        )
        return CompressionStatistics(filter_pruning=own)

    def strip_model(self, model: nn.Module) -> None:
        """Remove the pruned filters, and what only they feed."""
        masks = self.masks()
        kept = [masks[cluster.producers[0]].nonzero().squeeze(1) for cluster in self.clusters]
        bake(model, (FilterMask,))
        shrink(model, self.clusters, self._consumers, kept)

    def _get_algorithm_state(self) -> State:
        return {"level": float(self._level), "frozen": self._frozen, "kept": list(self._kept)}

    def _load_algorithm_state(self, state: State) -> None:
        self._level, self._frozen, self._kept = state["level"], state["frozen"], list(state["kept"])


@BaseCompressionAlgorithmBuilder.register("filter_pruning")
class FilterPruningBuilder(BaseCompressionAlgorithmBuilder):
    """Masks the filters of convolutions, and what follows them."""

    config_type = FilterPruningConfig
    order = 10

    def check(self, model: nn.Module) -> None:
        """See the base. Follows the channels through the model, too."""
        chosen = self.layers(model, CONVOLUTIONS)
        self._inputs = example_inputs(self.context, model)
        clusters, consumers = find_clusters(model, *self._inputs)
        params = self.config.params
        numbers = [
            number
            for number, cluster in enumerate(clusters)
            if all(name in chosen for name in cluster.producers)
            and (params.prune_first_conv or not cluster.reads_input)
            and (params.prune_downsample_convs or not cluster.strided)
            and not any(_is_bare_norm(model.get_submodule(name)) for name in cluster.followers)
        ]
        if not numbers:
            raise ValueError(
                "filter_pruning finds no filters to prune: channels that reach the model's output, or an "
                "operation that mixes them, stay; so do those that read the input (prune_first_conv) and "
                "those of convolutions with strides (prune_downsample_convs)"
            )
        renumbered: dict[int | None, int] = {old: new for new, old in enumerate(numbers)}
        self._clusters = [clusters[number] for number in numbers]
        self._consumers = [
            Consumer(
                each.name,
                tuple((renumbered.get(c), size, repeat) for c, size, repeat in each.segments),
            )
            for each in consumers
        ]
        self._costs = CostModel(model, self._clusters, self._consumers, *self._inputs)

    def _apply_to(self, model: nn.Module) -> None:
        if not hasattr(self, "_clusters"):
            self.check(model)
        for cluster in self._clusters:
            for name in (*cluster.producers, *cluster.followers):
                layer = model.get_submodule(name)
                for tensor in _tensors_of(layer):
                    parameter = getattr(layer, tensor)
                    axis = channel_axis_of(layer) if parameter.dim() > 1 else 0
                    mask = FilterMask(cluster.size, axis, parameter.dim(), parameter.device)
                    install(layer, mask, name=tensor)

    def _initialize(self, model: nn.Module) -> None:
        """Mask to the initial level: algorithms that are built in later see masked weights."""
        if self.config.pruning_init > 0:
            self._controller = self._make_controller(model)
            self._controller.set_level(self.config.pruning_init)

    def _make_controller(self, model: nn.Module) -> FilterPruningController:
        return FilterPruningController(
            model,
            self.config,
            self._clusters,
            self._consumers,
            self._costs,
            self.context.init_args.steps_per_epoch,
        )

    def build_controller(self, model: nn.Module) -> FilterPruningController:
        """See the base."""
        return getattr(self, "_controller", None) or self._make_controller(model)


def _is_bare_norm(layer: nn.Module) -> bool:
    """A batch norm without parameters, which turns zeros into something else."""
    return isinstance(layer, _BatchNorm) and not layer.affine
