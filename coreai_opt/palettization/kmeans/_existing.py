"""Palettes that a weight has already."""

import torch
from torch import Tensor

__all__ = ["existing_palettes"]

# So many points for each entry show, in nearly all weights, that a block has more distinct ones.
_POINTS_PER_ENTRY = 8
_KEYS = {4: torch.int32, 8: torch.int64}


def existing_palettes(vectors: Tensor, entries: int) -> list[tuple[Tensor, Tensor]]:
    """The distinct vectors of the leading blocks that have no more than ``entries`` of them.

    Args:
        vectors: ``(blocks, vectors, dim)``.
        entries: how many a palette can have.

    Returns:
        For each block up to the first with more, or with values that are not finite: its palette ``(n,
        dim)`` and the index of each vector, int64. Scalars ascend. Vectors of 4 or 8 bytes ascend as the
        integers that their bits make, others by their first entry, then the second, and so on.
    """
    found = []
    for block in vectors:
        if len(_distinct(block[: _POINTS_PER_ENTRY * entries])[0]) > entries:
            break
        palette, labels = _distinct(block)
        if len(palette) > entries or not bool(palette.isfinite().all()):
            break
        found.append((palette, labels))
    return found


def _distinct(vectors: Tensor) -> tuple[Tensor, Tensor]:
    dim = vectors.shape[1]
    key = _KEYS.get(dim * vectors.element_size())
    if dim == 1:
        palette, labels = vectors[:, 0].unique(return_inverse=True)
        return palette[:, None], labels
    if key is None:
        palette, labels = vectors.unique(dim=0, return_inverse=True)
        return palette, labels
    keys, labels = vectors.contiguous().view(key)[:, 0].unique(return_inverse=True)
    return keys[:, None].view(vectors.dtype), labels
