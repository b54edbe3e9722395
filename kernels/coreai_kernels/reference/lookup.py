"""Weights from centroids and indices, and the gradient back to the centroids."""

import torch
from torch import Tensor

from coreai_kernels import wide
from coreai_kernels.reference.bits import unpack_bits
from coreai_kernels.reference.layout import from_vectors, in_format_of, to_vectors

__all__ = ["lookup", "lookup_backward", "lookup_packed"]

# Elements held at a time where sums are made of comparisons.
_CHUNK = 1 << 22


def _index_blocks(block_size: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (block_size[0] // dim, *block_size[1:]) if block_size else ()


def lookup(
    indices: Tensor, centroids: Tensor, block_size: tuple[int, ...], mask: Tensor | None = None
) -> Tensor:
    """Weights of the dtype of ``centroids (blocks, k, dim)``, in the memory format of scalars' indices.

    Where the ``mask`` of scalars is False they are zero, with the sign of what was looked up.
    """
    blocks, _, dim = centroids.shape
    flat = to_vectors(indices, _index_blocks(block_size, dim)).reshape(blocks, -1, 1).long()
    values = centroids.gather(1, flat.expand(-1, -1, dim))
    shape = (indices.size(0) * dim, *indices.shape[1:]) if indices.dim() else ()
    result = from_vectors(values, shape, block_size)
    if mask is not None:
        result = torch.where(mask, result, torch.zeros_like(result).copysign(result))
    if dim == 1:
        return in_format_of(indices, result, centroids.dtype)
    return result.contiguous()


def lookup_packed(
    packed: Tensor, centroids: Tensor, shape: list[int], block_size: tuple[int, ...], bits: int
) -> Tensor:
    """:func:`lookup` of indices that are packed bits in row-major order; ``shape`` is the weight's."""
    dim = centroids.size(2)
    rows = (shape[0] // dim, *shape[1:]) if shape else ()
    indices = unpack_bits(packed, bits, torch.Size(rows).numel(), False).reshape(rows)
    return lookup(indices, centroids, block_size)


def lookup_backward(
    grad: Tensor, indices: Tensor, block_size: tuple[int, ...], num_clusters: int, dim: int
) -> Tensor:
    """Sum of ``grad`` over the weights of each centroid: float32 ``(blocks, num_clusters, dim)``."""
    flat = to_vectors(indices, _index_blocks(block_size, dim))[:, :, 0].long()
    blocks = flat.size(0)
    vectors = to_vectors(grad, block_size, dim).float()
    if not wide.has_float64(grad.device):
        return _sums_in_float32(vectors, flat, num_clusters)
    flat = flat + num_clusters * torch.arange(blocks, device=flat.device).unsqueeze(1)
    rows = vectors.reshape(-1, dim).double()
    sums = rows.new_zeros(blocks * num_clusters, dim).index_add_(0, flat.reshape(-1), rows)
    return sums.reshape(blocks, num_clusters, dim).float()


def _sums_in_float32(vectors: Tensor, flat: Tensor, num_clusters: int) -> Tensor:
    """By a reduction for each centroid: ``index_add_`` adds in another order on every run there."""
    sums = vectors.new_zeros(vectors.size(0), num_clusters, vectors.size(2))
    clusters = torch.arange(num_clusters, device=flat.device)
    step = max(1, _CHUNK // max(1, flat.size(0) * num_clusters))
    for start in range(0, flat.size(1), step):
        part = slice(start, start + step)
        owned = flat[:, part, None] == clusters
        for entry in range(vectors.size(2)):
            sums[:, :, entry] += torch.where(owned, vectors[:, part, entry, None], 0.0).sum(1)
    return sums
