"""From a weight to its palettes, and what has to hold before."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.palettization.kmeans._blocks import Blocks

if TYPE_CHECKING:
    from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize

__all__ = ["Clusters", "channel_scale", "checked_sensitivities", "cluster", "cluster_means"]


class Clusters(NamedTuple):
    """Palettes ``[blocks, 2 ** n_bits, cluster_dim]`` (float32) and the index of each vector (uint8)."""

    centroids: Tensor
    indices: Tensor


def channel_scale(weight: Tensor) -> Tensor:
    """The largest magnitude in each slice along axis 0, ``[channels, 1]``; one where that is zero."""
    largest = weight.abs().flatten(1).amax(1, keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def cluster(
    simulator: "_KMeansFakePalettize", weight: Tensor, blocks: Blocks, scale: Tensor | None
) -> Clusters:
    """Cluster a weight as the simulator's specification says.

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
        return _centroids_and_indices(simulator, weight, blocks.block_size, weights)
    except ValueError as error:
        raise ValueError(f"{name} cannot be clustered: {error}") from error


def _centroids_and_indices(
    simulator: "_KMeansFakePalettize", weight: Tensor, block_size: tuple[int, ...], weights: Tensor | None
) -> Clusters:
    entries = 2**simulator.n_bits
    count = min(entries, math.prod(block_size) // simulator.cluster_dim)
    if simulator.cluster_dim > 1:
        centroids = coreai_kernels.kmeans(
            weight,
            count,
            cluster_dim=simulator.cluster_dim,
            block_size=block_size,
            weights=weights,
        )
    else:
        decimals = _decimals(simulator, weight)
        if decimals is not None:
            weight = weight.to(torch.float16)
        centroids = coreai_kernels.kmeans_1d(
            weight, count, block_size=block_size, weights=weights, decimals=decimals
        )
        if decimals is not None:
            # A value belongs to the cluster that it was rounded into.
            weight = torch.round(weight.to(torch.float32), decimals=decimals)
    # A block of fewer values than entries has each of them, and repeats the last.
    centroids = torch.cat([centroids, centroids[:, -1:].expand(-1, entries - count, -1)], 1)
    return Clusters(centroids, coreai_kernels.palettize(weight, centroids, block_size=block_size))


def _decimals(simulator: "_KMeansFakePalettize", weight: Tensor) -> int | None:
    """Decimals to which float16 values are rounded before clustering; None to cluster them as they are.

    Fast mode is for weights that float16 can hold, and that are not so small that rounding would leave fewer
    values than the palette has entries.
    """
    if not simulator.enable_fast_kmeans_mode:
        return None
    decimals = simulator.rounding_precision
    largest = weight.abs().amax().item()
    fits = 2**simulator.n_bits * 10.0**-decimals <= largest <= torch.finfo(torch.float16).max
    return decimals if fits else None


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
