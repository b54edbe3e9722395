"""Palettized models for Core AI and Core ML."""

from pathlib import Path

import torch
from torch import Tensor, nn

from coreai_opt.common import ExportBackend
from coreai_opt.export import coreai, coreml, mapped
from coreai_opt.export.parametrized import Slot, replace_simulator, slots_of
from coreai_opt.export.records import Palette
from coreai_opt.export.torch import fold
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize

__all__ = ["finalize_palettes", "palette_of"]

_LUT_DTYPES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)


def finalize_palettes(model: nn.Module, backend: ExportBackend, mmap_dir: str | Path | None = None) -> None:
    """Replace the simulators of a palettized model by what the backend reads, in place.

    If anything fails, the model is as it was.

    Args:
        model: the prepared model.
        backend: Core AI or Core ML.
        mmap_dir: see :meth:`.KMeansPalettizer.finalize`.

    Raises:
        As :meth:`.KMeansPalettizer.finalize`.
    """
    if mmap_dir is not None:
        mapped.check(model, mmap_dir)
    slots = list(slots_of(model, _KMeansFakePalettize))
    for slot in slots:
        _check(slot, backend)
    if backend is ExportBackend.CoreAI:
        _to_core_ai(model, slots, mmap_dir)
    else:
        _to_core_ml(model, slots)


def _check(slot: Slot, backend: ExportBackend) -> None:
    simulator = slot.simulator
    dtype = None if simulator.lut_qspec is None else simulator.lut_qspec.dtype
    if backend is ExportBackend.CoreML:
        features = {
            "cluster_dim": simulator.cluster_dim > 1,
            "lut_qspec": dtype is not None,
            "enable_per_channel_scale": simulator.enable_per_channel_scale,
        }
        coreml.check_palette(slot.name, [name for name, used in features.items() if used], dtype)
        return
    if dtype is not None and dtype not in _LUT_DTYPES:
        raise ValueError(
            f"finalize: the tables of {slot.name!r} are quantized to {dtype}; Core AI has tables of int8, "
            f"uint8, float8_e4m3fn and float8_e5m2"
        )


def _to_core_ai(model: nn.Module, slots: list[Slot], mmap_dir: str | Path | None) -> None:
    coreai.require_operators()
    constants: dict[_KMeansFakePalettize, nn.Module] = {}
    with mapped.folder(mmap_dir) as folder:
        for slot in slots:
            if slot.simulator not in constants and not slot.simulator.is_disabled():
                record = palette_of(slot.simulator, slot.value())
                constants[slot.simulator] = folder.moved(coreai.weight_module(record, slot.name), slot.name)
    for slot in slots:
        if slot.simulator in constants:
            replace_simulator(slot, constants[slot.simulator])
    fold(model, _KMeansFakePalettize)  # those that do not fit their weights


def _to_core_ml(model: nn.Module, slots: list[Slot]) -> None:
    described = [
        (
            slot.module,
            slot.attribute,
            coreml.metadata_of(palette_of(slot.simulator, slot.value()), slot.name),
        )
        for slot in slots
        if not slot.simulator.is_disabled()
    ]
    fold(model, _KMeansFakePalettize)
    for module, attribute, metadata in described:
        coreml.add_metadata(module, attribute, metadata)
    coreml.mark(model)


@torch.no_grad()
def palette_of(simulator: _KMeansFakePalettize, weight: Tensor) -> Palette:
    """Tables and indices of a weight as they are now.

    Args:
        simulator: the weight's simulator.
        weight: the weight, dense.
    """
    simulator.ensure_initialized(weight)
    simulator.refresh_indices(weight)
    assert simulator.indices is not None
    grid = simulator.blocks(weight).grid
    shape = (*grid, 2**simulator.n_bits, simulator.cluster_dim)
    dequantized = simulator.palettes().detach().reshape(shape)
    lut, scale, zero_point = dequantized, simulator.lut_quantization_scale, None
    quantized = simulator.quantized_lut
    if quantized is not None and scale is not None:
        lut, scale = quantized.reshape(shape), scale.reshape(grid).to(weight.dtype)
        offset = simulator.lut_quantization_zero_point
        zero_point = None if offset is None else offset.reshape(grid).to(lut.dtype)
    channel_scale = simulator.per_channel_scale
    if channel_scale is not None:
        channel_scale = channel_scale.reshape(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)
    return Palette(
        simulator.indices.detach().clone(),
        lut.detach().clone(),
        scale,
        zero_point,
        channel_scale,
        simulator.sparsity.mask,
        dequantized.to(weight.dtype).clone(),
    )
