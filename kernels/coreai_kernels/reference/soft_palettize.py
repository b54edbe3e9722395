"""Differentiable k-means (Cho et al., DKM, arXiv 2108.12659): attention of weights over centroids.

With ``a = softmax over j of -|w_i - c_j|^2 / temperature``, in float32::

    soft_palettize   out_i = sum_j a_ij c_j
    soft_centroids   c_j   = sum_i a_ij w_i / mass_j,   mass_j = sum_i a_ij

The gradients recompute the attention. ``p`` below is the gradient to the exponents of the softmax.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from coreai_kernels.reference.layout import from_vectors, in_format_of, to_vectors
from coreai_kernels.wide import sum_dtype, widened

__all__ = [
    "LEAST_MASS",
    "soft_centroids_backward",
    "soft_centroids_forward",
    "soft_palettize_backward",
    "soft_palettize_forward",
]

# A centroid that attracts less than this stays where it is: its mean would be that of rounding errors.
LEAST_MASS = 2.0**-100
# Attention weights held at a time.
_CHUNK = 1 << 22


def _parts(count: int, table: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, table.size(0) * table.size(1)))
    for start in range(0, count, step):
        yield slice(start, start + step)


def _attention(vectors: Tensor, table: Tensor, temperature: float) -> Tensor:
    """``(blocks, n, k)`` for vectors ``(blocks, n, dim)`` and table ``(blocks, k, dim)``."""
    distance = torch.zeros((*vectors.shape[:2], table.size(1)), device=vectors.device)
    for entry in range(table.size(2)):
        distance += (vectors[:, :, entry, None] - table[:, None, :, entry]) ** 2
    # Differences before the quotient, so that no temperature is too small.
    sharpness = min(1.0 / temperature, torch.finfo(torch.float32).max / 2)
    return torch.softmax((distance.amin(2, keepdim=True) - distance) * sharpness, dim=2)


def _through_softmax(attention: Tensor, grad: Tensor) -> Tensor:
    return attention * (grad - (attention * grad).sum(2, keepdim=True))


def _pull(p: Tensor, vectors: Tensor, table: Tensor, temperature: float) -> Tensor:
    """Gradient to the centroids through the distances: ``sum_i p_ij (w_i - c_j) * 2 / temperature``."""
    moment = p.transpose(1, 2) @ vectors - p.sum(1).unsqueeze(2) * table
    return widened(moment) * (2.0 / temperature)


def soft_palettize_forward(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...]
) -> Tensor:
    """Attention-weighted centroids in the weight's dtype and memory format."""
    vectors = to_vectors(weight, block_size, centroids.size(2)).float()
    table = centroids.float()
    out = torch.empty_like(vectors)
    for part in _parts(vectors.size(1), table):
        out[:, part] = _attention(vectors[:, part], table, temperature) @ table
    return in_format_of(weight, from_vectors(out, weight.shape, block_size))


def soft_palettize_backward(
    grad: Tensor, weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients to the weight (its dtype) and to the centroids (float32)."""
    dim = centroids.size(2)
    vectors, table = to_vectors(weight, block_size, dim).float(), centroids.float()
    grads = to_vectors(grad, block_size, dim).float()
    to_weight = torch.empty_like(vectors)
    to_table = torch.zeros_like(table, dtype=sum_dtype(table.device))
    for part in _parts(vectors.size(1), table):
        attention = _attention(vectors[:, part], table, temperature)
        p = _through_softmax(attention, grads[:, part] @ table.transpose(1, 2))
        to_weight[:, part] = (p @ table) * (2.0 / temperature)
        to_table += widened(attention.transpose(1, 2) @ grads[:, part])
        to_table += _pull(p, vectors[:, part], table, temperature)
    to_weight = from_vectors(to_weight, weight.shape, block_size)
    return in_format_of(weight, to_weight), to_table.float()


def soft_centroids_forward(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The next centroids, float32 ``(blocks, k, dim)``, and the mass that each attracts, ``(blocks, k)``."""
    vectors, table = to_vectors(weight, block_size, centroids.size(2)).float(), centroids.float()
    total = torch.zeros_like(table, dtype=sum_dtype(table.device))
    mass = total.new_zeros(table.shape[:2])
    for part in _parts(vectors.size(1), table):
        attention = _attention(vectors[:, part], table, temperature)
        total += widened(attention.transpose(1, 2) @ vectors[:, part])
        mass += widened(attention.sum(1))
    moved = torch.where((mass < LEAST_MASS).unsqueeze(2), widened(table), total / mass.unsqueeze(2))
    return moved.float(), mass.float()


def soft_centroids_backward(
    grad: Tensor,
    moved: Tensor,
    mass: Tensor,
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    block_size: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Gradients to the weight (its dtype) and to the centroids before the step (float32)."""
    vectors, table = to_vectors(weight, block_size, centroids.size(2)).float(), centroids.float()
    stays = (mass < LEAST_MASS).unsqueeze(2)
    rate = torch.where(stays, 0.0, grad.float() / mass.unsqueeze(2))
    offset = (rate * moved).sum(2).unsqueeze(1)
    to_weight = torch.empty_like(vectors)
    to_table = torch.where(stays, widened(grad), 0.0)
    for part in _parts(vectors.size(1), table):
        attention = _attention(vectors[:, part], table, temperature)
        p = _through_softmax(attention, vectors[:, part] @ rate.transpose(1, 2) - offset)
        to_weight[:, part] = attention @ rate + (p @ table) * (2.0 / temperature)
        to_table += _pull(p, vectors[:, part], table, temperature)
    to_weight = from_vectors(to_weight, weight.shape, block_size)
    return in_format_of(weight, to_weight), to_table.float()
