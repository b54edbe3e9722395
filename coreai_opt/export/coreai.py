"""Compressed tensors as modules that Core AI's converter understands."""

import importlib
import logging
import warnings

import torch
from torch import nn

from coreai_opt.export import sparse_palettes
from coreai_opt.export.coreai_modules import (
    ActivationDequantize,
    ActivationQuantize,
    DequantizedWeight,
    PalettizedWeight,
    SparsePalettizedWeight,
    SparseWeight,
)
from coreai_opt.export.records import Affine, Palette, QuantizedActivation, Sparse, WeightRecord

__all__ = ["activation_module", "require_operators", "weight_module"]

logger = logging.getLogger(__name__)

# The module that registers the operators.
_OPERATORS = "coreai_torch._compression.custom_layers"

# Bits of the indices that the converter writes.
_INDEX_BITS = (1, 2, 4, 6, 8)


def require_operators() -> None:
    """Load the operators of Core AI.

    Raises:
        ImportError: the package coreai-torch is not installed, or does not load.
    """
    try:
        importlib.import_module(_OPERATORS)
    except ImportError as error:
        raise ImportError(
            f"models for Core AI need the package coreai-torch ({error}): "
            f"pip install 'coreai-opt-fused[coreai]'"
        ) from error


def weight_module(record: WeightRecord, name: str) -> nn.Module:
    """The parametrization that gives a weight from its compressed form.

    Args:
        record: the compressed weight.
        name: its qualified name, for messages.

    Raises:
        ValueError: Core AI has no such form.
    """
    if isinstance(record, Affine):
        scaled_by_powers = record.scale.dtype == torch.float8_e8m0fnu
        return DequantizedWeight(
            record.values,
            record.scale,
            record.zero_point,
            record.minval,
            None if record.dtype.is_floating_point else record.dtype,
            record.output_dtype if scaled_by_powers else None,
        )
    if isinstance(record, Sparse):
        return SparseWeight(record.weight[record.mask], record.mask)
    if record.mask is None:
        return _palettized(record, name)
    if not record.mask.any():
        logger.warning(f"{name}: all elements are zero; it is stored as a dense palette")
        return _palettized(sparse_palettes.as_dense(record), name)
    indices, lut, mask, scale = sparse_palettes.stored(record, name)
    return SparsePalettizedWeight(indices, _padded(lut, name), mask, scale)


def _palettized(record: Palette, name: str) -> nn.Module:
    scale, zero_point = sparse_palettes.combined_scale(record)
    if record.lut_scale is None or scale is None:
        return PalettizedWeight(record.indices, _padded(record.lut, name), scale)
    if record.n_bits == 8 and record.cluster_dim == 1:
        # An index has as many bits as what it stands for: the values themselves take no more.
        values = _looked_up(record)
        dtype = None if values.dtype.is_floating_point else values.dtype
        return DequantizedWeight(values, scale, zero_point, None, dtype, None)
    return PalettizedWeight(record.indices, _padded(record.lut, name), scale, zero_point)


def _looked_up(record: Palette) -> torch.Tensor:
    """The values that the indices stand for, as the tables hold them."""
    tables, indices = record.lut[..., 0], record.indices
    for axis, blocks in enumerate(tables.shape[:-1]):
        tables = tables.repeat_interleave(indices.shape[axis] // blocks, axis)
    # float8 values are gathered as the bytes that they are.
    gathered = tables.view(torch.uint8).gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)
    return gathered.view(record.lut.dtype)


def _padded(lut: torch.Tensor, name: str) -> torch.Tensor:
    """The table with as many entries as the converter can index, the last one repeated."""
    entries = lut.shape[-2]
    n_bits = (entries - 1).bit_length()
    stored = next(bits for bits in _INDEX_BITS if bits >= max(n_bits, 1))
    if stored != n_bits:
        warnings.warn(
            f"{name}: Core AI stores indices of {', '.join(map(str, _INDEX_BITS))} bits; those of {n_bits} "
            f"bits are stored with {stored}, the values are the same",
            UserWarning,
            stacklevel=2,
        )
    missing = (1 << stored) - entries
    if not missing:
        return lut
    # float8 has no concatenation: bytes have.
    table = lut.view(torch.uint8) if lut.dtype.itemsize == 1 else lut
    filler = table[..., -1:, :].expand(*table.shape[:-2], missing, table.shape[-1])
    return torch.cat([table, filler], -2).view(lut.dtype)


def activation_module(record: QuantizedActivation) -> nn.Module:
    """A sequence of ``quantize`` and ``dequantize`` in the place of an activation's simulator."""
    axis = 0 if record.axis is None else record.axis
    quantize = ActivationQuantize(
        record.scale, record.dtype, record.zero_point, record.minval, axis, record.lowest, record.highest
    )
    zero_point, minval = (
        None if each is None else each.clone() for each in (record.zero_point, record.minval)
    )
    dequantize = ActivationDequantize(
        record.scale.clone(),
        zero_point,
        minval,
        axis,
        None if record.dtype.is_floating_point else record.dtype,
        record.output_dtype,
    )
    pair = nn.Sequential()
    pair.add_module("quantize", quantize)
    pair.add_module("dequantize", dequantize)
    return pair
