"""The simulator whose palettes are found by k-means."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.palettization.config import VectorKMeansConfig
from coreai_opt.palettization.kmeans import _clustering
from coreai_opt.palettization.kmeans._blocks import Blocks
from coreai_opt.palettization.kmeans._palettes import PaletteState
from coreai_opt.palettization.kmeans._sparsity import gathered
from coreai_opt.palettization.kmeans._supported import OP_TYPES, TRANSPOSED_OPS
from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase
from coreai_opt.palettization.spec.granularity import (
    PalettizationGranularity,
    PerGroupedChannelGranularity,
)
from coreai_opt.palettization.spec.training_strategy import DefaultTrainingSpec, TrainingStrategySpec
from coreai_opt.quantization.spec import QuantizationSpec

__all__: list[str] = []

_SPACING = "palette_spacing"


@_FakePalettizeImplBase.register("default")
class _KMeansFakePalettize(PaletteState):
    """Palettes that minimize the (weighted) sum of squared errors, found in the first forward or on demand.

    Args:
        n_bits, lut_qspec, granularity, cluster_dim, enable_per_channel_scale: see :class:`PalettizationSpec`.
        sensitivities: weights of the squared errors, of the weight's shape.
        enable_fast_kmeans_mode: cluster values rounded to ``rounding_precision`` decimals.
        rounding_precision: decimals kept in fast mode.
        op_to_optimize: the function that uses the weight; it settles which axis holds the output channels.
        training_strategy_spec: what happens in training; None for the default strategy.
        vector_kmeans_config: how much k-means of vectors searches, a configuration or a dict of its fields;
            None for the default search.
        sparsity_detection_threshold: see :class:`PalettizationSpec`.
    """

    def __init__(
        self,
        n_bits: int,
        lut_qspec: QuantizationSpec | None,
        granularity: PalettizationGranularity,
        cluster_dim: int,
        enable_per_channel_scale: bool,
        sensitivities: Tensor | None = None,
        enable_fast_kmeans_mode: bool = True,
        rounding_precision: int = 4,
        op_to_optimize: Callable[..., Any] | None = None,
        training_strategy_spec: TrainingStrategySpec | None = None,
        vector_kmeans_config: VectorKMeansConfig | dict[str, Any] | None = None,
        sparsity_detection_threshold: float | None = None,
    ) -> None:
        if isinstance(granularity, PerGroupedChannelGranularity) and granularity.axis is None:
            op_type = OP_TYPES.get(op_to_optimize) if op_to_optimize is not None else None
            granularity = granularity.model_copy(update={"axis": int(op_type in TRANSPOSED_OPS)})
        super().__init__(
            n_bits,
            lut_qspec,
            granularity,
            cluster_dim,
            enable_per_channel_scale,
            sparsity_detection_threshold,
        )
        if vector_kmeans_config is not None:
            vector_kmeans_config = VectorKMeansConfig.model_validate(vector_kmeans_config)
        self.vector_kmeans_config = vector_kmeans_config
        self.enable_fast_kmeans_mode = enable_fast_kmeans_mode
        self.rounding_precision = rounding_precision
        # Squared distance between neighbouring palette entries: the unit of soft assignment's temperature.
        self.palette_spacing = 1.0
        self._training_strategy = (training_strategy_spec or DefaultTrainingSpec()).build_strategy()
        self._sensitivities = _clustering.checked_sensitivities(sensitivities)

    @property
    def sensitivities(self) -> Tensor | None:
        """Weights of the squared errors, of the weight's shape. Setting them invalidates the palettes.

        Raises:
            TypeError: they are not a tensor of real numbers.
            ValueError: one of them is negative or not finite.
        """
        return self._sensitivities

    @sensitivities.setter
    def sensitivities(self, sensitivities: Tensor | None) -> None:
        self._sensitivities = _clustering.checked_sensitivities(sensitivities)
        self._invalidate()

    def ensure_initialized(self, tensor: Tensor) -> None:
        """Compute the palettes of ``tensor`` unless they are there. See the base class.

        Raises:
            TypeError: ``tensor`` is not floating point.
            ValueError: it has values that are not finite, or the sensitivities have another shape.
        """
        known = self._sparsity_detected
        self.detect_sparsity(tensor)
        if self._centroids_initialized:
            return
        with torch.no_grad():
            weight = tensor.detach()
            # Zeros that were found here are zeros.
            self._cluster(self.masked(weight) if known or self._stored_positions is not None else weight)
            # Observes the palettes, so that the state holds their scales from the start.
            self.palettes()
        self._training_strategy.on_palette_computed(self)

    def forward_enabled(self, tensor: Tensor) -> Tensor:
        """In training what the training strategy makes of the weight, otherwise its palettized values."""
        if self.training:
            return self._training_strategy.train_forward(self, tensor)
        return self.hard_assign(tensor)

    def hard_assign(self, weight: Tensor) -> Tensor:
        """Palettized values of ``weight``, by the stored indices unless they are out of date.

        No gradient reaches the weight; the palettes get theirs if they are trained.
        """
        self.detect_sparsity(weight)
        self.refresh_indices(weight)
        block_size = self.point_blocks(weight).block_size
        mask = self._sparsity_mask if self._stored_positions is None else None
        values = coreai_kernels.lookup(self.index_rows(), self.palettes(), block_size=block_size, mask=mask)
        return self.restored(values, weight, are_masked=True)

    def refresh_indices(self, weight: Tensor) -> None:
        """Assign the values of ``weight`` to the palettes anew if the stored indices are out of date."""
        if not self._centroids_initialized:
            return
        moving = self.training and self._training_strategy.updates_weight
        if not (self._indices_stale or moving):
            return
        with torch.no_grad():
            weight = weight.detach()
            self.detect_sparsity(weight)
            if self.enable_per_channel_scale and self.per_channel_scale is None:
                self.per_channel_scale = _clustering.channel_scale(self.masked(weight))
            indices = self.nearest(self.points(weight), self.palettes(), weight)
            self.indices = indices if self._stored_positions is None else indices.flatten()
        self._indices_stale = False

    def nearest(self, points: Tensor, palettes: Tensor, weight: Tensor) -> Tensor:
        """Index of the entry of ``palettes`` nearest to each of the ``points`` of ``weight``."""
        return coreai_kernels.palettize(points, palettes, block_size=self.point_blocks(weight).block_size)

    def vectorize(self, weight: Tensor) -> tuple[Tensor, tuple[Blocks, Tensor]]:
        """The scaled weight as ``[blocks, vectors, cluster_dim]``, and what :meth:`devectorize` needs.

        The scale of each channel is computed from ``weight`` anew, and kept.
        """
        self.detect_sparsity(weight)
        if self.enable_per_channel_scale:
            self.per_channel_scale = _clustering.channel_scale(self.masked(weight.detach()))
        blocks = self.point_blocks(weight)
        return blocks.vectors(self.points(weight)), (blocks, weight)

    def devectorize(self, vectors: Tensor, context: tuple[Blocks, Tensor]) -> Tensor:
        """The weight that :meth:`vectorize` made these vectors of."""
        blocks, weight = context
        return self.restored(blocks.weight(vectors), weight)

    def refine(self, weight: Tensor, iterations: int) -> None:
        """Let the palettes follow the weight by Lloyd's iterations, without waiting for the device.

        Args:
            weight: the weight, of the shape that the palettes are for.
            iterations: how many times to assign the values and to move each entry to the mean of its own.
        """
        points, centroids = self.points(weight.detach()), self.stored_palettes().detach()
        block_size, mass = self.point_blocks(weight).block_size, self._point_mass()
        held = self.held_entries()
        for _ in range(iterations):
            indices = self.nearest(points, centroids, weight)
            moved = _clustering.cluster_means(points, indices, centroids, block_size, mass)
            centroids = moved if held is None else torch.where(held, 0.0, moved)
        self.overwrite_palettes(centroids)
        self._indices_stale = True

    def _point_mass(self) -> Tensor | None:
        """The sensitivity of each of the points; none at all for those that are masked."""
        mass, mask = self._sensitivities, self._sparsity_mask
        if self._stored_positions is not None:
            if mass is None:
                return None
            return gathered(mass.to(self._stored_positions.device), self._stored_positions, self.cluster_dim)
        if mask is None:
            return mass
        return mask.float() if mass is None else mass.to(mask.device) * mask

    def step(self, weight: Tensor, step: int) -> None:
        """A training step is over: let the training strategy do what it does between steps."""
        self._training_strategy.on_step(self, weight, step)

    def train(self, mode: bool = True) -> "_KMeansFakePalettize":
        """Switch between training and evaluation; after training the indices are out of date."""
        if self.training and not mode and self._training_strategy.updates_weight:
            self._indices_stale = True
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """The specification in short."""
        parts = [f"n_bits={self.n_bits}", f"granularity={self.granularity!r}"]
        if self.cluster_dim > 1:
            parts.append(f"cluster_dim={self.cluster_dim}")
        if self.enable_per_channel_scale:
            parts.append("enable_per_channel_scale=True")
        if self.sparsity_detection_threshold is not None:
            parts.append(f"sparsity_detection_threshold={self.sparsity_detection_threshold}")
        return ", ".join(parts)

    def _cluster(self, weight: Tensor) -> None:
        """Find the palettes of a weight that is masked already."""
        blocks = self._grid(weight.shape)
        scale = _clustering.channel_scale(weight) if self.enable_per_channel_scale else None
        found = _clustering.cluster(self, weight, blocks, scale)
        self._blocks, self.per_channel_scale = blocks, scale
        self.indices = found.indices
        self.set_palettes(found.centroids.to(weight.dtype))
        self._centroids_initialized = True
        self._indices_stale = False

    def _invalidate(self) -> None:
        self._centroids_initialized = False
        self._indices_stale = True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._training_strategy.uses_palette_spacing and self._centroids_initialized:
            # Trained palettes no longer have the spacing that they were computed with.
            destination[prefix + _SPACING] = torch.tensor(self.palette_spacing, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        spacing = state_dict.get(prefix + _SPACING)
        if spacing is not None:
            # No buffer, which each forward would have to read from the device.
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + _SPACING}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._centroids_initialized:
            self._training_strategy.on_palette_computed(self)
            if spacing is not None:
                self.palette_spacing = float(spacing)
