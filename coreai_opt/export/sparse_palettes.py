"""Palettized weights with zeros: indices of the other elements alone."""

from dataclasses import replace

import torch
from torch import Tensor

from coreai_opt.export.records import Palette

__all__ = ["as_dense", "check", "combined_scale", "stored"]


def check(record: Palette, name: str) -> None:
    """ValueError unless the palette can be stored with zeros left out."""
    groups = record.lut.shape[0]
    if record.lut.numel() != groups * record.lut.shape[-2] * record.lut.shape[-1]:
        raise ValueError(
            f"'{name}' has zeros left out, and tables for groups along another axis than 0: palettize it per "
            f"tensor or in groups along axis 0, or with sparsity_detection_threshold=None"
        )
    if record.lut_scale is not None and record.cluster_dim > 1:
        raise ValueError(
            f"'{name}' has zeros left out, and quantized tables of vectors "
            f"(cluster_dim={record.cluster_dim}): use lut_qspec=None, cluster_dim=1, "
            f"or sparsity_detection_threshold=None"
        )
    if record.lut_zero_point is not None and record.lut_zero_point.any():
        raise ValueError(
            f"{name}: zeros are left out, so tables must be quantized around zero, but their zero points are "
            f"{record.lut_zero_point.flatten().tolist()[:8]}: use qscheme 'symmetric' and a signed dtype in "
            f"lut_qspec"
        )


def stored(record: Palette, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is stored of a weight with zeros.

    Returns:
        Indices of the stored elements (or vectors of them) in row-major order; tables ``[groups, entries,
        length of a vector]``, each for an equal part of the indices; the mask of the stored elements; the
        scale, of the weight's rank, or None.

    Raises:
        ValueError: see :func:`check`; or a group with fewer elements than others has no zero in its table.
    """
    check(record, name)
    assert record.mask is not None
    groups = record.lut.shape[0]
    lut = record.lut.reshape(groups, *record.lut.shape[-2:])
    scale, _ = combined_scale(record)
    if record.indices.dim() == 1 and record.mask.dim() > 1:
        return record.indices, lut, record.mask, scale
    mask = _evened(record.mask, groups)
    fillers = mask & ~record.mask
    if fillers.any():
        indices = record.indices.reshape(groups, -1).long()
        table = lut[..., 0].float()
        values = table.gather(1, indices).reshape(mask.shape)
        if values[fillers].any():
            raise ValueError(
                f"{name}: groups have different numbers of stored elements, and the smaller ones no entry of "
                f"their tables that is 0 to fill them with"
            )
    return record.indices[mask], lut, mask, scale


def _evened(mask: Tensor, groups: int) -> Tensor:
    """The mask with as many elements in each group: the first zeros of those that have fewer are added."""
    rows = mask.reshape(groups, -1)
    counts = rows.sum(1)
    missing = counts.max() - counts
    rank_of_zero = (~rows).cumsum(1)
    return (rows | (~rows & (rank_of_zero <= missing.unsqueeze(1)))).reshape(mask.shape)


def as_dense(record: Palette) -> Palette:
    """The palette without the mask, whose elements must have indices of zeros."""
    return replace(record, mask=None)


def combined_scale(record: Palette) -> tuple[Tensor | None, Tensor | None]:
    """The scales of tables and channels in one, and the zero points of tables in the same shape."""
    scale, zero_point = record.lut_scale, record.lut_zero_point
    if scale is None or record.channel_scale is None:
        return (record.channel_scale if scale is None else scale), zero_point
    repeats = record.channel_scale.shape[0] // scale.shape[0]
    scale = scale.repeat_interleave(repeats, 0) * record.channel_scale
    return scale, None if zero_point is None else torch.repeat_interleave(zero_point, repeats, 0)
