"""Removing pruned channels, and units of linear layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.controllers.core.layers import channel_axis_of
from coreai_opt.controllers.core.qdq import SCALE, ZERO_POINT
from coreai_opt.controllers.structures.channels import Cluster, Consumer

__all__ = ["shrink", "shrink_units"]


@torch.no_grad()
def shrink(
    model: nn.Module, clusters: Sequence[Cluster], consumers: Sequence[Consumer], kept: Sequence[Tensor]
) -> None:
    """Leave the kept channels of each cluster, in place.

    Args:
        model: without masks.
        clusters: of the model.
        consumers: of the model.
        kept: for each cluster, the indices of its channels that stay, ascending.
    """
    for cluster, indices in zip(clusters, kept, strict=True):
        for name in cluster.producers:
            layer: Any = model.get_submodule(name)
            _select_outputs(layer, indices)
            layer.out_channels = indices.numel()
        for name in cluster.followers:
            layer = model.get_submodule(name)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                _select(layer, tensor, indices, 0)
            if hasattr(layer, "num_features"):
                layer.num_features = indices.numel()
            else:
                layer.in_channels = layer.out_channels = layer.groups = indices.numel()
    for consumer in consumers:
        layer = model.get_submodule(consumer.name)
        indices = _input_indices(consumer, kept)
        _select(layer, "weight", indices, 1 - channel_axis_of(layer))
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", indices.numel())


@torch.no_grad()
def shrink_units(model: nn.Module, rows: Sequence[str], columns: Sequence[str], kept: Tensor) -> None:
    """Leave the kept units of linear layers, in place; the first one, if none is kept.

    Args:
        model: without masks, with zeros for the units that go.
        rows: layers that make the units.
        columns: layers that read them.
        kept: bool, one a unit; a unit is as many neighbouring rows, or columns, as a layer has for each.
    """
    units = kept.nonzero().squeeze(1)
    units = units if units.numel() else units.new_zeros(1)
    for name in rows:
        layer: Any = model.get_submodule(name)
        _select_outputs(layer, _features(units, layer.out_features // kept.numel()))
        layer.out_features = layer.weight.shape[0]
    for name in columns:
        layer = model.get_submodule(name)
        _select(layer, "weight", _features(units, layer.in_features // kept.numel()), 1)
        layer.in_features = layer.weight.shape[1]


def _features(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).reshape(-1)


def _select_outputs(layer: nn.Module, indices: Tensor) -> None:
    _select(layer, "weight", indices, channel_axis_of(layer))
    _select(layer, "bias", indices, 0)
    for tensor in (SCALE, ZERO_POINT):  # of a quantized weight that is being exported
        found = getattr(layer, tensor, None)
        if found is not None and found.numel() > 1:
            _select(layer, tensor, indices, channel_axis_of(layer))


def _select(layer: nn.Module, name: str, indices: Tensor, axis: int) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    chosen = tensor.detach().index_select(axis, indices.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(layer, name, nn.Parameter(chosen, requires_grad=tensor.requires_grad))
    else:
        setattr(layer, name, chosen)


def _input_indices(consumer: Consumer, kept: Sequence[Tensor]) -> Tensor:
    parts, start = [], 0
    for cluster, size, repeat in consumer.segments:
        channels = torch.arange(size) if cluster is None else kept[cluster].cpu()
        within = torch.arange(repeat)
        parts.append(start + (channels[:, None] * repeat + within).reshape(-1))
        start += size * repeat
    return torch.cat(parts)
