"""Palettes of weights in models that are being exported: tables are kept, and found in the values after."""

from typing import Any

import torch
from torch import Tensor

from coreai_opt.export.records import Palette
from coreai_opt.palettization.kmeans._export import palette_of

__all__ = ["keep_palette", "take_palette"]

# Buffers, in a layer that is being exported, of its weight's tables and of what channels are multiplied with.
_TABLES, _SCALE = "weight_palette", "weight_palette_scale"


def keep_palette(layer: Any, simulator: Any, weight: Tensor) -> None:
    """Keep the tables of a simulator in its layer, until :func:`take_palette`.

    Args:
        layer: has the weight.
        simulator: of the weight.
        weight: as the simulator gets it.
    """
    record = palette_of(simulator, weight)
    layer.register_buffer(_TABLES, record.dequantized_lut, persistent=False)
    layer.register_buffer(_SCALE, record.channel_scale, persistent=False)
    layer.weight_palette_shape = weight.shape


def take_palette(layer: Any, name: str) -> Palette | None:
    """The palette of a layer's weight, which other algorithms may have shrunk or masked since; None without.

    Args:
        layer: what was kept in it is taken away.
        name: qualified name of the weight, for messages.

    Raises:
        ValueError: channels that share a table, or have a scale, were removed.
    """
    if _TABLES not in layer._buffers:
        return None
    tables, scale = layer._buffers.pop(_TABLES), layer._buffers.pop(_SCALE)
    layer._non_persistent_buffers_set -= {_TABLES, _SCALE}
    before: Any = layer.weight_palette_shape
    del layer.weight_palette_shape
    weight: Any = layer.weight
    assert tables is not None
    grid = tables.shape[:-2]
    shared = [axis for axis, count in enumerate(grid) if count > 1]
    if any(weight.shape[axis] != before[axis] for axis in shared) or (
        scale is not None and weight.shape[0] != before[0]
    ):
        raise ValueError(
            f"{name!r} has lost channels that share a table or have a scale each: Core AI and Core ML hold "
            f"equal groups. Use group_size: null and per_channel_scale: false, or save_format 'onnx'"
        )
    return _found(weight.detach(), tables, scale, shared, name)


@torch.no_grad()
def _found(weight: Tensor, tables: Tensor, scale: Tensor | None, shared: list[int], name: str) -> Palette:
    relative = weight if scale is None else torch.where(scale != 0, weight / scale, 0.0)
    axis = shared[0] if shared else 0
    parts = relative.chunk(tables.shape[axis], axis)
    entries = tables.movedim(axis, 0).reshape(len(parts), -1)
    indices = [_nearest(part, table) for part, table in zip(parts, entries, strict=True)]
    values = torch.cat([table[each] for each, table in zip(indices, entries, strict=True)], axis)
    values = (values if scale is None else values * scale).to(weight.dtype)
    mask = weight != 0
    if not ((values == weight) | ~mask).all():
        raise ValueError(f"{name!r} is not made of its palette: another algorithm has changed it since")
    return Palette(
        torch.cat(indices, axis).to(torch.uint8),
        tables,
        None,
        None,
        scale,
        None if torch.equal(values, weight) else mask,
        tables,
    )


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    ordered, order = table.float().sort()
    between = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(values.float().contiguous(), between)]
