"""Removing pruned channels, and units of linear layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.controllers.core.layers import channel_axis_of
from coreai_opt.controllers.core.qdq import SCALE, ZERO_POINT
from coreai_opt.controllers.structures.channels import Channels, Span

__all__ = ["indices_of", "mask_of", "shrink", "shrink_units"]

Replaced = dict[tuple[int, int], Tensor]


def mask_of(spans: Sequence[Span], kept: Sequence[Tensor]) -> Tensor:
    """One value an entry of the spans: those of the clusters' masks, and ones for what stays.

    Args:
        spans: of an axis.
        kept: for each cluster, one value a unit.
    """
    parts = []
    for span in spans:
        if span.cluster is None:
            like = kept[0] if kept else torch.ones(())
            parts.append(like.new_ones(span.entries))
        else:
            mask = kept[span.cluster]
            parts.append(mask.repeat_interleave(span.entries // mask.numel()))
    return torch.cat(parts)


def indices_of(spans: Sequence[Span], kept: Sequence[Tensor]) -> Tensor:
    """The entries that stay, ascending; ``kept`` as for :func:`mask_of`. Waits for the device."""
    return mask_of(spans, kept).nonzero().squeeze(1)


@torch.no_grad()
def shrink(model: nn.Module, channels: Channels, kept: Sequence[Tensor]) -> None:
    """Leave the kept channels of each cluster, in place. Tensors that layers share stay shared.

    Args:
        model: without masks.
        channels: of the model.
        kept: for each cluster, one value a unit: zero for those that go.
    """
    replaced: Replaced = {}
    for name, spans in channels.producers.items():
        if all(span.cluster is None for span in spans):
            continue
        layer: Any = model.get_submodule(name)
        indices = indices_of(spans, kept)
        _select_outputs(layer, indices, replaced)
        layer.out_channels = indices.numel()
    for name, spans in channels.followers.items():
        if any(span.cluster is not None for span in spans):
            _shrink_follower(model.get_submodule(name), indices_of(spans, kept), replaced)
    for name, spans in channels.consumers.items():
        if all(span.cluster is None for span in spans):
            continue
        layer = model.get_submodule(name)
        indices = indices_of(spans, kept)
        _select(layer, "weight", indices, 1 - channel_axis_of(layer), replaced, part=1)
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", indices.numel())


def _shrink_follower(layer: Any, indices: Tensor, replaced: Replaced) -> None:
    if hasattr(layer, "kernel_size"):  # depthwise: entries are outputs, several for each input
        times = layer.out_channels // layer.in_channels
        inputs = indices[::times] // times
        transposed = channel_axis_of(layer) == 1
        _select(layer, "weight", inputs if transposed else indices, 0, replaced)
        _select(layer, "bias", indices, 0, replaced)
        for tensor in (SCALE, ZERO_POINT):
            if (
                getattr(layer, tensor, None) is not None
                and getattr(layer, tensor).numel() > 1
                and not transposed
            ):
                _select(layer, tensor, indices, 0, replaced)
        layer.in_channels = layer.groups = inputs.numel()
        layer.out_channels = indices.numel()
        return
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        _select(layer, tensor, indices, 0, replaced)
    for count in ("num_features", "num_channels", "num_groups", "num_parameters"):
        if hasattr(layer, count):
            setattr(layer, count, indices.numel())


@torch.no_grad()
def shrink_units(model: nn.Module, rows: Sequence[str], columns: Sequence[str], kept: Tensor) -> None:
    """Leave the kept units of linear layers, in place; the first one, if none is kept.

    Args:
        model: without masks, with zeros for the units that go.
        rows: layers that make the units.
        columns: layers that read them.
        kept: bool, one a unit; a unit is as many neighbouring rows, or columns, as a layer has for each.
    """
    replaced: Replaced = {}
    units = kept.nonzero().squeeze(1)
    units = units if units.numel() else units.new_zeros(1)
    for name in rows:
        layer: Any = model.get_submodule(name)
        _select_outputs(layer, _features(units, layer.out_features // kept.numel()), replaced)
        layer.out_features = layer.weight.shape[0]
    for name in columns:
        layer = model.get_submodule(name)
        _select(layer, "weight", _features(units, layer.in_features // kept.numel()), 1, replaced, part=1)
        layer.in_features = layer.weight.shape[1]


def _features(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size, device=units.device)).reshape(-1)


def _select_outputs(layer: nn.Module, indices: Tensor, replaced: Replaced) -> None:
    _select(layer, "weight", indices, channel_axis_of(layer), replaced)
    _select(layer, "bias", indices, 0, replaced)
    for tensor in (SCALE, ZERO_POINT):  # of a quantized weight that is being exported
        found = getattr(layer, tensor, None)
        if found is not None and found.numel() > 1:
            _select(layer, tensor, indices, channel_axis_of(layer), replaced)


def _select(
    layer: nn.Module, name: str, indices: Tensor, axis: int, replaced: Replaced, part: int = 0
) -> None:
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    key = (id(tensor), part)
    if key not in replaced:
        chosen = tensor.detach().index_select(axis, indices.to(tensor.device))
        new: Any = nn.Parameter(chosen, requires_grad=tensor.requires_grad)
        replaced[key] = new if isinstance(tensor, nn.Parameter) else chosen
        # The tensor must outlive its identity, by which sharing layers find the new one.
        replaced[-id(tensor) - 1, part] = tensor
    setattr(layer, name, replaced[key])


def total(spans: Sequence[Span], kept: Sequence[int], sizes: Sequence[int]) -> int:
    """Entries of spans that stay, with so many units kept of clusters of these sizes."""
    return sum(
        span.entries if span.cluster is None else span.entries // sizes[span.cluster] * kept[span.cluster]
        for span in spans
    )
