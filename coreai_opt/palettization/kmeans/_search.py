"""k-means of blocks: of whole ones, and of the values that pruning has left in them."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.palettization.config import VectorKMeansConfig

if TYPE_CHECKING:
    from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize

__all__ = ["Clusters", "Settings", "cluster_kept", "padded"]


class Clusters(NamedTuple):
    """Palettes ``[blocks, 2 ** n_bits, cluster_dim]`` and the index of each vector (uint8)."""

    centroids: Tensor
    indices: Tensor


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
    def of(cls, simulator: "_KMeansFakePalettize", weight: Tensor) -> "Settings":
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
            weight = self._as_searched(weight)
            centroids = coreai_kernels.kmeans_1d(
                weight, count, block_size=block_size, weights=weights, decimals=self.decimals
            )
            weight = self.rounded(weight)
        centroids = padded(centroids, self.entries)
        return Clusters(centroids, coreai_kernels.palettize(weight, centroids, block_size=block_size))

    def scalars(self, values: Tensor, entries: int, weights: Tensor | None) -> Tensor:
        """The palette of some scalars, ``(1, entries, 1)``."""
        centroids = coreai_kernels.kmeans_1d(
            self._as_searched(values),
            min(entries, values.numel()),
            block_size=(values.numel(),),
            weights=weights,
            decimals=self.decimals,
        )
        return padded(centroids, entries)

    def rounded(self, weight: Tensor) -> Tensor:
        """The values that are assigned: each belongs to the cluster that it was rounded into."""
        if self.decimals is None:
            return weight
        return torch.round(self._as_searched(weight).to(torch.float32), decimals=self.decimals)

    def _as_searched(self, weight: Tensor) -> Tensor:
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
    first = torch.zeros(len(values), dtype=torch.int64) if reserving is None else reserving.long().cpu()

    def palette(block: int) -> Tensor:
        inside = kept[block]
        if not bool(inside.any()):
            return values.new_zeros((1, settings.entries, 1), dtype=torch.float32)
        weights = None if mass is None else mass[block, :, 0][inside]
        return settings.scalars(values[block][inside], settings.entries - int(first[block]), weights)

    # The operator shares out blocks among threads, but here blocks differ in their numbers of values.
    with ThreadPoolExecutor(min(len(values), torch.get_num_threads())) as pool:
        found = list(pool.map(palette, range(len(values))))
    # Without the entry for zero; instead the last one twice, of which the second is never nearest.
    free = torch.cat([padded(each, settings.entries) for each in found])
    offset = first.to(values.device)[:, None]
    labels = coreai_kernels.palettize(settings.rounded(values), free, block_size=(1, values.shape[1]))
    shifted = torch.cat([torch.zeros_like(free[:, :1]), free[:, :-1]], 1)
    centroids = torch.where(offset[:, :, None] > 0, shifted, free)
    return Clusters(centroids, (labels + offset.to(torch.uint8)) * kept)


def padded(centroids: Tensor, entries: int) -> Tensor:
    """Palettes ``(blocks, n, dim)`` with so many entries: the last one is repeated."""
    missing = entries - centroids.shape[1]
    if missing == 0:
        return centroids
    return torch.cat([centroids, centroids[:, -1:].expand(-1, missing, -1)], 1)


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
