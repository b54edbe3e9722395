"""Filter pruning: whole output channels of convolutions are masked, and removed in the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import coreai_kernels
from coreai_opt._sharding.layout import whole
from coreai_opt.controllers.algorithms.filter_pruning_config import FilterPruningConfig
from coreai_opt.controllers.core.api import CompressionStage, State
from coreai_opt.controllers.core.base import (
    BaseCompressionAlgorithmController,
)
from coreai_opt.controllers.core.layers import channel_axis_of
from coreai_opt.controllers.core.masks import bake, original
from coreai_opt.controllers.core.statistics import AlgorithmStatistics, CompressionStatistics
from coreai_opt.controllers.schedules.of_simulators import scheduler_class_of
from coreai_opt.controllers.structures.channels import Channels, Cluster, Span
from coreai_opt.controllers.structures.flops import CostModel
from coreai_opt.controllers.structures.shrink import mask_of, shrink
from coreai_opt.controllers.structures.verify import masked_tensors

__all__ = ["FilterMask", "FilterPruningController", "FilterPruningStatistics", "pruned_layers"]

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
        self.coefficients: list[tuple[float, float]] | None = None
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
        scheduler_class = scheduler_class_of(params.schedule)
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
            weight = whole(original(layer).detach()).float().movedim(channel_axis_of(layer), 0)
            filters = weight.reshape(cluster.size, -1)
            if self.config.params.filter_importance == "geometric_median":
                own = torch.cdist(filters, filters).sum(1)
            else:
                order = 1 if self.config.params.filter_importance == "L1" else 2
                own = torch.linalg.vector_norm(filters, ord=order, dim=1)
            total = own if total is None else total + own
        assert total is not None  # a cluster has a producer
        return total

    @torch.no_grad()
    def relative_importances(self) -> list[Tensor]:
        """Importances of the filters of each cluster, relative to the cluster's norm."""
        tiny = torch.finfo(torch.float32).tiny
        found = [self._importance(cluster) for cluster in self.clusters]
        return [each / torch.linalg.vector_norm(each).clamp(min=tiny) for each in found]

    def _ranking(self, importances: Sequence[Tensor]) -> list[int]:
        """The clusters of all filters, by ascending importance relative to the cluster's norm."""
        tiny = torch.finfo(torch.float32).tiny
        parts = [each / torch.linalg.vector_norm(each).clamp(min=tiny) for each in importances]
        if self.coefficients is not None:
            pairs = zip(parts, self.coefficients, strict=True)
            parts = [part * factor + offset for part, (factor, offset) in pairs]
        relative = torch.cat(parts)
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
        learned = None if self.coefficients is None else [list(pair) for pair in self.coefficients]
        return {
            "level": float(self._level),
            "frozen": self._frozen,
            "kept": list(self._kept),
            "coefficients": learned,
        }

    def _load_algorithm_state(self, state: State) -> None:
        self._level, self._frozen, self._kept = state["level"], state["frozen"], list(state["kept"])
        learned = state.get("coefficients")
        self.coefficients = None if learned is None else [(factor, offset) for factor, offset in learned]
