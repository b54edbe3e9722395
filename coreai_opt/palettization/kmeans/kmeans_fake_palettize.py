"""The simulator whose palettes are found by k-means."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.palettization.kmeans import _clustering
from coreai_opt.palettization.kmeans._blocks import Blocks
from coreai_opt.palettization.kmeans._palettes import PaletteState
from coreai_opt.palettization.kmeans._supported import OP_TYPES, TRANSPOSED_OPS
from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase
from coreai_opt.palettization.spec.granularity import (
    PalettizationGranularity,
    PerGroupedChannelGranularity,
)
from coreai_opt.palettization.spec.training_strategy import DefaultTrainingSpec, TrainingStrategySpec
from coreai_opt.quantization.spec import QuantizationSpec

__all__: list[str] = []


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
    ) -> None:
        if isinstance(granularity, PerGroupedChannelGranularity) and granularity.axis is None:
            op_type = OP_TYPES.get(op_to_optimize) if op_to_optimize is not None else None
            granularity = granularity.model_copy(update={"axis": int(op_type in TRANSPOSED_OPS)})
        super().__init__(n_bits, lut_qspec, granularity, cluster_dim, enable_per_channel_scale)
        self.enable_fast_kmeans_mode = enable_fast_kmeans_mode
        self.rounding_precision = rounding_precision
        # Squared distance between neighbouring palette entries: the unit of soft assignment's temperature.
        self.palette_spacing = 1.0
        self._training_strategy = (training_strategy_spec or DefaultTrainingSpec()).build_strategy()
        self._sensitivities = _clustering.checked_sensitivities(sensitivities)
        self._frozen = False

    @property
    def is_frozen(self) -> bool:
        """Whether training is over: the values are fixed."""
        return self._frozen

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
        if self._centroids_initialized:
            return
        with torch.no_grad():
            self._cluster(tensor.detach())
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
        block_size = self.blocks(weight).block_size
        self.refresh_indices(weight)
        assert self.indices is not None
        values = coreai_kernels.lookup(self.indices, self.palettes(), block_size=block_size)
        return self.unscale(values).to(weight.dtype)

    def refresh_indices(self, weight: Tensor) -> None:
        """Assign the values of ``weight`` to the palettes anew if the stored indices are out of date."""
        if not self._centroids_initialized:
            return
        moving = self.training and self._training_strategy.updates_weight
        if not (self._indices_stale or moving):
            return
        with torch.no_grad():
            self.indices = self.nearest(self.scaled(weight.detach()), self.palettes())
        self._indices_stale = False

    def nearest(self, scaled: Tensor, palettes: Tensor) -> Tensor:
        """Index of the entry of ``palettes`` nearest to each vector of a scaled weight."""
        return coreai_kernels.palettize(scaled, palettes, block_size=self.blocks(scaled).block_size)

    def scaled(self, weight: Tensor) -> Tensor:
        """The weight divided by the scale of each channel."""
        return weight if self.per_channel_scale is None else weight / self._scale_for(weight)

    def unscale(self, values: Tensor) -> Tensor:
        """Values multiplied by the scale of each channel."""
        return values if self.per_channel_scale is None else values * self._scale_for(values)

    def vectorize(self, weight: Tensor) -> tuple[Tensor, Blocks]:
        """The scaled weight as ``[blocks, vectors, cluster_dim]``, and what :meth:`devectorize` needs.

        The scale of each channel is computed from ``weight`` anew, and kept.
        """
        blocks = self.blocks(weight)
        if self.enable_per_channel_scale:
            self.per_channel_scale = _clustering.channel_scale(weight.detach())
        return blocks.vectors(self.scaled(weight)), blocks

    def devectorize(self, vectors: Tensor, context: Blocks) -> Tensor:
        """The weight that :meth:`vectorize` made these vectors of."""
        return self.unscale(context.weight(vectors))

    def refine(self, weight: Tensor, iterations: int) -> None:
        """Let the palettes follow the weight by Lloyd's iterations, without waiting for the device.

        Args:
            weight: the weight, of the shape that the palettes are for.
            iterations: how many times to assign the values and to move each entry to the mean of its own.
        """
        block_size = self.blocks(weight).block_size
        scaled, centroids = self.scaled(weight.detach()), self.stored_palettes().detach()
        for _ in range(iterations):
            indices = self.nearest(scaled, centroids)
            centroids = _clustering.cluster_means(scaled, indices, centroids, block_size, self._sensitivities)
        with torch.no_grad():
            self.stored_palettes().copy_(centroids)
        self._indices_stale = True

    def step(self, weight: Tensor, step: int) -> None:
        """A training step is over: let the training strategy do what it does between steps."""
        self._training_strategy.on_step(self, weight, step)

    def freeze(self, weight: Tensor) -> None:
        """Fix the palettized values of ``weight``, whatever the training strategy was."""
        if self.is_on():
            self.ensure_initialized(weight)
            self.refresh_indices(weight)
        self._training_strategy = DefaultTrainingSpec().build_strategy()
        if isinstance(self.centroids, torch.nn.Parameter):
            self.register_buffer("centroids", self._parameters.pop("centroids").detach())  # type: ignore[union-attr]
        self._frozen = True

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
        return ", ".join(parts)

    def _cluster(self, weight: Tensor) -> None:
        blocks = Blocks.of(weight.shape, self.granularity, self.cluster_dim)
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

    def _scale_for(self, weight: Tensor) -> Tensor:
        assert self.per_channel_scale is not None
        return self.per_channel_scale.reshape(-1, *[1] * (weight.dim() - 1))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._centroids_initialized:
            self._training_strategy.on_palette_computed(self)
