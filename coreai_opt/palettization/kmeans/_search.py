"""k-means of blocks: of whole ones, and of the values that pruning has left in them."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.palettization.config import VectorKMeansConfig
from coreai_opt.palettization.kmeans._sparsity import Sparsity

__all__ = ["Clusters", "KMeansSimulator", "Settings", "cluster_kept", "padded"]


class Clusters(NamedTuple):
    """Palettes ``[blocks, 2 ** n_bits, cluster_dim]`` and the index of each vector (uint8)."""

    centroids: Tensor
    indices: Tensor


class KMeansSimulator(Protocol):
    """What clustering reads of a simulator with palettes."""

    tensor_fqn: str
    n_bits: int
    cluster_dim: int
    enable_fast_kmeans_mode: bool
    rounding_precision: int
    vector_kmeans_config: VectorKMeansConfig | None

    @property
    def sensitivities(self) -> Tensor | None: ...

    @property
    def sparsity(self) -> Sparsity: ...


class Settings(NamedTuple):
    """How to cluster.

    Attributes:
        entries: of a palette.
        cluster_dim: length of vectors.
        decimals: to which float16 scalars are rounded before clustering; None to cluster them as they are.
        vectors: how much k-means of vectors searches; None for the default search.
    """

    entries: int
    cluster_dim: int
    decimals: int | None
    vectors: VectorKMeansConfig | None

    @classmethod
    def of(cls, simulator: KMeansSimulator, weight: Tensor) -> "Settings":
        """Those of a simulator for its weight."""
        return cls(
            2**simulator.n_bits,
            simulator.cluster_dim,
            _decimals(simulator, weight),
            simulator.vector_kmeans_config,
        )

    def cluster(self, weight: Tensor, block_size: tuple[int, ...], weights: Tensor | None) -> Clusters:
        """Clusters of a weight's blocks. ``indices`` as ``coreai_kernels.palettize`` gives them.

        A block of fewer vectors than entries has each of them, and repeats the last.
        """
        count = min(self.entries, math.prod(block_size) // self.cluster_dim)
        if self.cluster_dim > 1:
            centroids = self._vectors(weight, count, block_size, weights)
        else:
            weight = self.searched(weight)
            centroids = coreai_kernels.kmeans_1d(
                weight, count, block_size=block_size, weights=weights, decimals=self.decimals
            )
        centroids = padded(centroids, self.entries)
        # Each value belongs to the cluster that it was rounded into.
        decimals = self.decimals if self.cluster_dim == 1 else None
        indices = coreai_kernels.palettize(weight, centroids, block_size=block_size, decimals=decimals)
        return Clusters(centroids, indices)

    def scalars(self, values: Tensor, weights: Tensor, entries: int) -> Tensor:
        """Palettes of scalars ``(blocks, n)``, those of no weight left out: ``(blocks, entries, 1)``."""
        count = values.shape[1]
        centroids = coreai_kernels.kmeans_1d(
            values, min(entries, count), block_size=(1, count), weights=weights, decimals=self.decimals
        )
        return padded(centroids, entries)

    def searched(self, weight: Tensor) -> Tensor:
        """The values that are clustered."""
        return weight if self.decimals is None else weight.to(torch.float16)

    def _vectors(
        self, weight: Tensor, count: int, block_size: tuple[int, ...], weights: Tensor | None
    ) -> Tensor:
        chosen = self.vectors
        if chosen is None:
            return coreai_kernels.kmeans(
                weight, count, cluster_dim=self.cluster_dim, block_size=block_size, weights=weights
            )
        trials = chosen.n_local_trials
        return coreai_kernels.plain_kmeans(
            weight,
            count,
            cluster_dim=self.cluster_dim,
            block_size=block_size,
            weights=weights,
            restarts=chosen.n_init,
            candidates=2 + int(math.log(count)) if trials is None else trials,
            max_iterations=chosen.max_iter,
            # Apple's package looks at five iterations at a time, of which the last gains least.
            tolerance=chosen.tol / 5,
        )


def cluster_kept(
    settings: Settings, values: Tensor, kept: Tensor, mass: Tensor | None, reserving: Tensor | None
) -> Clusters:
    """Clusters of the kept scalars of each block; the others have index 0.

    Args:
        settings: how to cluster.
        values: ``(blocks, n)``.
        kept: which of them, bool ``(blocks, n)``.
        mass: weights of the squared errors, ``(blocks, n, 1)``; None for equal ones.
        reserving: blocks whose entry 0 is the value zero, bool ``(blocks,)``; None for none of them.
    """
    values = settings.searched(values)
    weights = kept
    if mass is not None:
        weights = mass[:, :, 0] * kept
        # Where none of the kept values has any weight, they have equal ones.
        weights = torch.where(weights.any(1, keepdim=True), weights, kept.to(weights.dtype))
    reserves = [False] * len(values) if reserving is None else reserving.tolist()
    found = torch.empty(len(values), settings.entries, 1, device=values.device)
    for reserved in set(reserves):
        its = [block for block, each in enumerate(reserves) if each == reserved]
        chosen = slice(None) if len(its) == len(reserves) else its
        palettes = settings.scalars(values[chosen], weights[chosen], settings.entries - reserved)
        found[chosen] = padded(palettes, settings.entries)
    # Without the entry for zero; instead the last one twice, of which the second is never nearest.
    labels = coreai_kernels.palettize(
        values, found, block_size=(1, values.shape[1]), decimals=settings.decimals
    )
    if reserving is not None:
        labels += reserving[:, None]
        shifted = torch.cat([torch.zeros_like(found[:, :1]), found[:, :-1]], 1)
        found = torch.where(reserving[:, None, None], shifted, found)
    return Clusters(found, labels.mul_(kept.view(torch.uint8)))


def padded(centroids: Tensor, entries: int) -> Tensor:
    """Palettes ``(blocks, n, dim)`` with so many entries: the last one is repeated."""
    missing = entries - centroids.shape[1]
    if missing == 0:
        return centroids
    return torch.cat([centroids, centroids[:, -1:].expand(-1, missing, -1)], 1)


def _decimals(simulator: KMeansSimulator, weight: Tensor) -> int | None:
    """Decimals to which float16 values are rounded before clustering; None to cluster them as they are.

    Fast mode is for weights that float16 can hold, and that are not so small that rounding would leave fewer
    values than the palette has entries.
    """
    if not simulator.enable_fast_kmeans_mode:
        return None
    decimals = simulator.rounding_precision
    lowest, highest = weight.aminmax()
    largest = max(-lowest.item(), highest.item())
    fits = 2**simulator.n_bits * 10.0**-decimals <= largest <= torch.finfo(torch.float16).max
    return decimals if fits else None
