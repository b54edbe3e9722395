"""Filter pruning: whole output channels of convolutions are masked, and removed in the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

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
from coreai_opt.controllers.core.scopes import matching, modules_in_scope
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.schedules.levels import LevelScheduler
from coreai_opt.controllers.schedules.params import ScheduleParams
from coreai_opt.controllers.structures.channels import Channels, Cluster, Span, find_channels
from coreai_opt.controllers.structures.flops import CostModel
from coreai_opt.controllers.structures.shrink import mask_of, shrink
from coreai_opt.controllers.structures.verify import mask_axis, masked_tensors, removable

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
        outputs: of the layer, several for each channel where a depthwise convolution multiplies them.
    """

    mask: Tensor

    def __init__(
        self, channels: int, axis: int, dims: int, device: torch.device, outputs: int | None = None
    ) -> None:
        super().__init__()
        self._view = [-1 if index == axis else 1 for index in range(dims)]
        self._times = 1 if outputs is None else outputs // channels
        self.register_buffer("mask", torch.ones(channels, device=device))

    def entries_of(self, outputs: Tensor) -> Tensor:
        """The mask of the layer's outputs, for the parameter's channels."""
        return outputs[:: self._times]

    def forward(self, tensor: Tensor) -> Tensor:
        """The masked parameter."""
        return tensor * self.mask.reshape(self._view).to(tensor.dtype)


def pruned_layers(channels: Channels) -> dict[str, tuple[Span, ...]]:
    """The layers that lose filters, or parameters for each, and the spans of these."""
    both = {**channels.producers, **channels.followers}
    return {name: spans for name, spans in both.items() if any(span.cluster is not None for span in spans)}


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
        channels: Channels,
        costs: CostModel,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self.clusters = tuple(channels.clusters)
        self._channels = channels
        self._costs = costs
        self._level = config.pruning_init
        self._frozen = False
        self._kept = [cluster.size for cluster in self.clusters]
        # Units are multiples of a number that makes the filters multiples of 8.
        self._multiples = [
            max(1, MULTIPLE * cluster.size // channels.producers[cluster.producers[0]][0].entries)
            for cluster in self.clusters
        ]
        params = config.params
        self._by_flops = params.pruning_flops_target is not None
        target = params.pruning_flops_target if self._by_flops else params.pruning_target
        self._target = float(target or 0.0)
        # Kept apart from the model, whose parametrizations another algorithm's strip may remove.
        self._masks = {
            (layer, tensor): _filter_mask(target_model.get_submodule(layer), tensor)
            for layer in pruned_layers(channels)
            for tensor in masked_tensors(target_model.get_submodule(layer))
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
        least = zip(self._multiples, self.clusters, strict=True)
        return self._rate_of([min(multiple, cluster.size) for multiple, cluster in least])

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
        masks = [
            coreai_kernels.topk_mask(importance, kept)
            for importance, kept in zip(importances, self._kept, strict=True)
        ]
        for (name, _), link in self._masks.items():
            link.mask.copy_(link.entries_of(mask_of(pruned_layers(self._channels)[name], masks)))

    def _importance(self, cluster: Cluster) -> Tensor:
        """Of each channel: the sum over the cluster's convolutions."""
        total: Tensor | None = None
        for name in cluster.producers:
            layer = self._model.get_submodule(name)
            weight = original(layer).detach().float().movedim(channel_axis_of(layer), 0)
            filters = weight.reshape(cluster.size, -1)
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
            min(size, max(multiple, multiple * math.ceil(each / multiple - _TOLERANCE)))
            for size, each, multiple in zip(sizes, wanted, self._multiples, strict=True)
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
            LayerPruning(name, filters, filters - filters // cluster.size * kept, number)
            for number, (cluster, kept) in enumerate(zip(self.clusters, self._kept, strict=True))
            for name in cluster.producers
            for filters in (self._channels.producers[name][0].entries,)
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
        kept = [masks[each.producers[0]].reshape(each.size, -1)[:, 0] for each in self.clusters]
        bake(model, (FilterMask,))
        shrink(model, self._channels, kept)

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
        self.layers(model, CONVOLUTIONS)
        self._inputs = example_inputs(self.context, model)
        channels = find_channels(model, *self._inputs)
        if self._loaded is not None and "clusters" in self._loaded:
            saved = [set(each) for each in self._loaded["clusters"]]
            numbers = [n for n, each in enumerate(channels.clusters) if set(each.producers) in saved]
        else:
            numbers = self._choose(model, channels)
        if not numbers:
            left = "; ".join(f"{each.name}: {each.reason}" for each in self.left_whole[:5])
            raise ValueError(
                "filter_pruning finds no filters to prune: channels that reach the model's output, or an "
                "operation that mixes them, stay; so do those that read the input (prune_first_conv) and "
                f"those of convolutions with strides (prune_downsample_convs). {left}".rstrip(". ")
            )
        self._channels = channels.only(numbers)
        self._costs = CostModel(model, self._channels, *self._inputs)

    def _choose(self, model: nn.Module, channels: Channels) -> list[int]:
        """The clusters that the configuration wants pruned, and that can be; says which cannot."""
        params, scope = self.config.params, modules_in_scope(model, self.config)
        ignored = matching(self.config.ignored_scopes, model, "ignored_scopes", self.config.validate_scopes)
        ran = {*channels.producers, *channels.followers}
        for name in self.layers(model, CONVOLUTIONS):
            if name in channels.whole:
                self.leave_whole(name, channels.whole[name])
            elif name not in ran and name not in {run.layer for run in channels.runs}:
                self.leave_whole(name, "its forward does not run")
        numbers = []
        for number, cluster in enumerate(channels.clusters):
            outside = [name for name in cluster.producers if name not in scope]
            outside += [
                name
                for name in cluster.followers
                if name in ignored
                or (name not in scope and isinstance(model.get_submodule(name), CONVOLUTIONS))
            ]
            if outside:
                for name in (name for name in cluster.producers if name in scope):
                    self.leave_whole(name, f"{outside[0]!r}, which is not in scope, has the same channels")
            elif (params.prune_first_conv or not cluster.reads_input) and (
                params.prune_downsample_convs or not cluster.strided
            ):
                numbers.append(number)
        good, bad = removable(model, channels.only(numbers), *self._inputs)
        for index, reason in bad.items():
            for name in channels.clusters[numbers[index]].producers:
                self.leave_whole(name, reason)
        return [numbers[index] for index in good]

    def _get_state(self) -> State:
        return {"clusters": [list(cluster.producers) for cluster in self._channels.clusters]}

    def _apply_to(self, model: nn.Module) -> None:
        if not hasattr(self, "_channels"):
            self.check(model)
        for name, spans in pruned_layers(self._channels).items():
            layer = model.get_submodule(name)
            for attribute in masked_tensors(layer):
                tensor = getattr(layer, attribute)
                axis = mask_axis(layer, tensor)
                outputs = sum(span.entries for span in spans)
                mask = FilterMask(tensor.shape[axis], axis, tensor.dim(), tensor.device, outputs)
                install(layer, mask, name=attribute)

    def _initialize(self, model: nn.Module) -> None:
        """Mask to the initial level: algorithms that are built in later see masked weights."""
        if self.config.pruning_init > 0:
            self._controller = self._make_controller(model)
            self._controller.set_level(self.config.pruning_init)

    def _make_controller(self, model: nn.Module) -> FilterPruningController:
        return FilterPruningController(
            model,
            self.config,
            self._channels,
            self._costs,
            self.context.init_args.steps_per_epoch,
        )

    def build_controller(self, model: nn.Module) -> FilterPruningController:
        """See the base."""
        return getattr(self, "_controller", None) or self._make_controller(model)
