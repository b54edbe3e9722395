"""Apple's k-means palettizer, with clustering of the engine.

Scalar blocks are clustered by :func:`coreai_kernels.kmeans_1d`, which is exact as Apple's is; vectors, masked
blocks and all else go Apple's way.
"""

import torch
from torch import Tensor

import coreai_kernels
from coreai_accelerate.state import STATE, PickledAs, Replacement, fall_back, has_kernels
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize

__all__ = ["FusedKMeansFakePalettize", "replacements"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedKMeansFakePalettize(_KMeansFakePalettize, PickledAs):
    """Apple's simulator, which clusters scalars on the engine."""

    _pickled_as = _KMeansFakePalettize

    def _get_name(self) -> str:
        return _KMeansFakePalettize.__name__  # a printed model looks as it did

    def _cluster_weights_1d(
        self, block_weight: Tensor, block_sensitivity: Tensor | None, num_clusters: int | None = None
    ) -> tuple[Tensor, Tensor]:
        found = self._clustered(block_weight, block_sensitivity, num_clusters) if STATE.is_active else None
        if found is None:
            found = super()._cluster_weights_1d(block_weight, block_sensitivity, num_clusters)
        return found  # type: ignore[no-any-return]

    def _clustered(
        self, weight: Tensor, sensitivity: Tensor | None, num_clusters: int | None
    ) -> tuple[Tensor, Tensor] | None:
        """Centroids and the index of each value's; None where Apple's method has to decide."""
        count = 2**self.n_bits if num_clusters is None else num_clusters
        if not has_kernels(torch.empty(0)):  # on the CPU, where clustering runs
            fall_back("no compiled library")
            return None
        if weight.dtype not in _DTYPES:
            fall_back(str(weight.dtype).removeprefix("torch."))
            return None
        if weight.numel() < count:
            fall_back("clustering of few values")
            return None
        if sensitivity is not None:
            sensitivity = sensitivity.detach().flatten().cpu().float()
            if not bool((sensitivity.isfinite() & (sensitivity > 0)).all()):
                fall_back("clustering with sensitivities that are not positive")
                return None
        values, decimals = weight.detach().flatten().cpu(), None
        if self.enable_fast_kmeans_mode:
            values, decimals = values.to(torch.float16), self.rounding_precision
        if not bool(values.isfinite().all()):
            fall_back("clustering of values that are not finite")
            return None
        palette = coreai_kernels.kmeans_1d(
            values, count, block_size=(values.numel(),), weights=sensitivity, decimals=decimals
        ).flatten()
        if bool((palette[1:] == palette[:-1]).any()):
            fall_back("clustering of few values")  # fewer distinct ones than clusters
            return None
        if decimals is not None:
            values = torch.round(values.float(), decimals=decimals)
        # The boundary between two clusters lies halfway between their means.
        middles = (palette[1:].double() + palette[:-1].double()) / 2
        return palette.double(), torch.bucketize(values.double(), middles)


def replacements() -> list[Replacement]:
    """The simulator that the palettizer builds."""
    return [Replacement("palettizer's simulator", _KMeansFakePalettize, FusedKMeansFakePalettize)]
