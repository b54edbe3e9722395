"""From a weight to its palettes, and what has to hold before."""

import logging
from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.palettization.kmeans._blocks import Blocks
from coreai_opt.palettization.kmeans._existing import existing_palettes
from coreai_opt.palettization.kmeans._search import Clusters, KMeansSimulator, Settings, cluster_kept, padded
from coreai_opt.palettization.kmeans._sparsity import gathered

__all__ = ["channel_scale", "checked_sensitivities", "cluster", "cluster_means"]


logger = logging.getLogger(__name__)


def channel_scale(weight: Tensor) -> Tensor:
    """The largest magnitude in each slice along axis 0, ``[channels, 1]``; one where that is zero."""
    largest = weight.abs().flatten(1).amax(1, keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def cluster(simulator: KMeansSimulator, weight: Tensor, blocks: Blocks, scale: Tensor | None) -> Clusters:
    """Cluster a weight, masked already, as the simulator's specification says.

    Raises:
        TypeError: the weight is not floating point.
        ValueError: it has no values, or some that are not finite, or the sensitivities have another shape.
    """
    name = f"Tensor {simulator.tensor_fqn!r}"
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be floating point to be palettized; got {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{name} must have values to be palettized; got shape {tuple(weight.shape)}")
    weights = simulator.sensitivities
    if weights is not None:
        if weights.shape != weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, but its sensitivities have {tuple(weights.shape)}"
            )
        weights = weights.to(weight.device, torch.float32)
    if scale is not None:
        weight = weight / scale.reshape(-1, *[1] * (weight.dim() - 1))
    try:
        return _clusters(simulator, weight, blocks, weights)
    except ValueError as error:
        raise ValueError(f"{name} cannot be clustered: {error}") from error


def _clusters(simulator: KMeansSimulator, weight: Tensor, blocks: Blocks, weights: Tensor | None) -> Clusters:
    settings = Settings.of(simulator, weight)
    sparsity = simulator.sparsity
    if sparsity.positions is not None:
        dim = settings.cluster_dim
        columns = gathered(weight, sparsity.positions, dim)
        if weights is not None:
            weights = gathered(weights, sparsity.positions, dim)
        centroids, indices = settings.cluster(columns, (dim, columns.shape[1]), weights)
        return Clusters(centroids, indices.flatten())
    vectors = blocks.vectors(weight)
    existing = existing_palettes(vectors, settings.entries)
    if existing:
        logger.info(
            f"{simulator.tensor_fqn!r}: {len(existing)} of {blocks.count} blocks have no more values than "
            f"their palette has entries, and keep them"
        )
    elif sparsity.mask is None:
        return settings.cluster(weight, blocks.block_size, weights)
    found = [_as_it_is(*each, settings.entries) for each in existing]
    if len(existing) < blocks.count:
        mass = None if weights is None else blocks.vectors(weights)[len(existing) :]
        rest = vectors[len(existing) :]
        if sparsity.mask is None:
            found.append(_cluster_vectors(settings, rest, mass))
        else:
            kept = blocks.vectors(sparsity.mask)[len(existing) :, :, 0]
            reserving = None if sparsity.reserving is None else sparsity.reserving[len(existing) :]
            found.append(cluster_kept(settings, rest[:, :, 0], kept, mass, reserving))
    palettes = torch.cat([each.centroids.to(weight.dtype) for each in found])
    # Indices are as many as the weight's values: one part is not copied.
    indices = found[0].indices if len(found) == 1 else torch.cat([each.indices for each in found])
    return Clusters(palettes, blocks.indices(indices))


def _as_it_is(palette: Tensor, labels: Tensor, entries: int) -> Clusters:
    """A block with a palette, and the index of each of its vectors, as one of one block."""
    return Clusters(padded(palette[None], entries), labels[None].to(torch.uint8))


def _cluster_vectors(settings: Settings, vectors: Tensor, mass: Tensor | None) -> Clusters:
    """Clusters of ``vectors (blocks, vectors, dim)``, with an index for each: ``(blocks, vectors)``."""
    blocks, count, dim = vectors.shape
    columns = vectors.transpose(1, 2).reshape(blocks * dim, count)
    weights = None if mass is None else mass.transpose(1, 2).reshape(blocks * dim, count)
    return settings.cluster(columns, (dim, count), weights)


def checked_sensitivities(sensitivities: Any) -> Tensor | None:
    """``sensitivities`` if they can weigh squared errors.

    Raises:
        TypeError: they are not a tensor of real numbers.
        ValueError: one of them is negative or not finite.
    """
    if sensitivities is None:
        return None
    if not isinstance(sensitivities, Tensor):
        raise TypeError(f"sensitivities must be a tensor; got {type(sensitivities).__name__}")
    if sensitivities.is_complex() or sensitivities.dtype == torch.bool:
        raise TypeError(f"sensitivities must be real numbers; got {sensitivities.dtype}")
    if not bool(torch.isfinite(sensitivities).all()):
        raise ValueError("sensitivities must be finite; got NaN or infinity among them")
    if bool((sensitivities < 0).any()):
        raise ValueError(f"sensitivities must not be negative; the least is {sensitivities.min().item():g}")
    return sensitivities


def cluster_means(
    weight: Tensor, indices: Tensor, centroids: Tensor, block_size: tuple[int, ...], weights: Tensor | None
) -> Tensor:
    """The (weighted) mean of each cluster, float32; an entry of ``centroids`` where a cluster has no weight.

    Nothing waits for the device, and the sums are deterministic.
    """
    palette = centroids.detach().to(torch.float32).requires_grad_()
    values = weight.detach().to(torch.float32)
    mass = torch.ones_like(values) if weights is None else weights.to(values.device, torch.float32)
    with torch.enable_grad():
        looked_up = coreai_kernels.lookup(indices, palette, block_size=block_size)
    # The gradient of a look-up sums over each cluster.
    (sums,) = torch.autograd.grad(looked_up, palette, values * mass, retain_graph=True)
    (total,) = torch.autograd.grad(looked_up, palette, mass)
    return torch.where(total > 0, sums / total, palette.detach())
