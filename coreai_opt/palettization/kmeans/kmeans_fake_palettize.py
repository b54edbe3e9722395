"""The simulator whose palettes are found by k-means."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.palettization.kmeans import _clustering
from coreai_opt.palettization.kmeans._blocks import Blocks
from coreai_opt.palettization.kmeans._supported import OP_TYPES, TRANSPOSED_OPS
from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase
from coreai_opt.palettization.spec.granularity import (
    PalettizationGranularity,
    PerGroupedChannelGranularity,
)
from coreai_opt.palettization.spec.training_strategy import DefaultTrainingSpec, TrainingStrategySpec
from coreai_opt.quantization.spec import (
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__: list[str] = []

@_FakePalettizeImplBase.register("default")
class _KMeansFakePalettize(_FakePalettizeImplBase):
    """Palettes that minimize the (weighted) sum of squared errors, found in the first forward or on demand.

    State, once there are palettes: ``centroids`` ``[blocks, 2 ** n_bits, cluster_dim]`` in the weight's dtype,
    ``indices`` (uint8) of the weight's shape with axis 0 divided by ``cluster_dim``, and ``per_channel_scale``
    ``[channels, 1]`` if asked for.

    Args:
        n_bits, lut_qspec, granularity, cluster_dim, enable_per_channel_scale: see :class:`PalettizationSpec`.
        sensitivities: weights of the squared errors, of the weight's shape.
        enable_fast_kmeans_mode: cluster values rounded to ``rounding_precision`` decimals.
        rounding_precision: decimals kept in fast mode.
        op_to_optimize: the function that uses the weight; it settles which axis holds the output channels.
        training_strategy_spec: what happens in training; None for the default strategy.
    """

    indices: Tensor | None
    centroids: Tensor | None
    per_channel_scale: Tensor | None

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
        self._training_strategy = (training_strategy_spec or DefaultTrainingSpec()).build_strategy()
        self._lut_fake_quantizer = _lut_quantizer(lut_qspec)
        self.register_buffer("indices", None)
        self.register_buffer("per_channel_scale", None)
        self.register_buffer("centroids", None)
        # Squared distance between neighbouring palette entries: the unit of soft assignment's temperature.
        self.palette_spacing = 1.0
        self._blocks: Blocks | None = None
        self._centroids_initialized = False
        self._indices_stale = False
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

    @property
    def lut(self) -> Tensor:
        """The look-up table, ``[blocks along axis 0, blocks along axis 1, 2 ** n_bits, cluster_dim]``.

        Quantized and dequantized if the specification quantizes palettes.

        Raises:
            RuntimeError: there are no palettes yet.
        """
        return self._as_lut(self.palettes())

    @property
    def quantized_lut(self) -> Tensor | None:
        """The look-up table in the dtype that palettes are quantized to; None if they are not."""
        return None if self._lut_fake_quantizer is None else self._as_lut(self.quantize_lut(self._centroids()))

    @property
    def lut_quantization_scale(self) -> Tensor | None:
        """Scale of each palette, ``[blocks along axis 0, blocks along axis 1, 1, 1]``; None if unquantized."""
        return self._lut_qparam(0)

    @property
    def lut_quantization_zero_point(self) -> Tensor | None:
        """Zero point of each palette, shaped as the scale; None if unquantized, or in floating point."""
        return self._lut_qparam(1)

    def quantize_lut(self, lut: Tensor) -> Tensor:
        """Quantized values of palettes ``[blocks, 2 ** n_bits, cluster_dim]``, in the dtype of quantization.

        Raises:
            RuntimeError: the specification does not quantize palettes.
        """
        if self._lut_fake_quantizer is None:
            raise RuntimeError("the specification has no lut_qspec: there is nothing to quantize palettes to")
        rows = _rows(lut)
        qparams = self._lut_fake_quantizer.qparams_calculator(rows.detach())
        return self._lut_fake_quantizer.quantize(rows, *qparams).reshape(lut.shape)

    def palettes(self) -> Tensor:
        """The palettes as they are used, ``[blocks, 2 ** n_bits, cluster_dim]``, with gradients.

        Raises:
            RuntimeError: there are none yet.
        """
        centroids = self._centroids()
        if self._lut_fake_quantizer is None:
            return centroids
        quantized: Tensor = self._lut_fake_quantizer(_rows(centroids))
        return quantized.reshape(centroids.shape)

    def blocks(self, weight: Tensor) -> Blocks:
        """The grid of the weight's blocks.

        Raises:
            _IncompatibleGranularityError, _IncompatibleClusterDimError: the specification does not fit.
            RuntimeError: there are palettes, for a weight of another shape.
        """
        blocks = self._blocks
        if blocks is None or blocks.shape != tuple(weight.shape):
            blocks = Blocks.of(weight.shape, self.granularity, self.cluster_dim)
            self._check_state_fits(blocks)
            self._blocks = blocks
        return blocks

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
        blocks = self.blocks(weight)
        self.refresh_indices(weight)
        values = coreai_kernels.lookup(self.indices, self.palettes(), block_size=blocks.block_size)
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
        """The scaled weight as vectors ``[blocks, vectors, cluster_dim]``, and what :meth:`devectorize` needs.

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
        with torch.no_grad():
            scaled, centroids = self.scaled(weight.detach()), self._centroids()
            for _ in range(iterations):
                indices = self.nearest(scaled, centroids)
                centroids = coreai_kernels.cluster_means(
                    scaled, indices, centroids, block_size=block_size, weights=self._sensitivities
                )
            self._centroids().copy_(centroids)
        self._indices_stale = True

    def step(self, weight: Tensor, step: int) -> None:
        """A training step is over: let the training strategy do what it does between steps."""
        self._training_strategy.on_step(self, weight, step)

    def freeze(self, weight: Tensor) -> None:
        """Fix the palettized values of ``weight``, whatever the training strategy was."""
        self.ensure_initialized(weight)
        self.refresh_indices(weight)
        centroids = self._centroids().detach()
        self._parameters.pop("centroids", None)
        self.register_buffer("centroids", centroids)
        self._training_strategy = DefaultTrainingSpec().build_strategy()
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

    def set_centroids(self, centroids: Tensor) -> None:
        """Put new palettes in the place of the old ones, as buffer or parameter as those are."""
        old = self.centroids
        if isinstance(old, torch.nn.Parameter) and old.shape == centroids.shape:
            with torch.no_grad():
                old.copy_(centroids)
        else:
            self.centroids = centroids

    def _cluster(self, weight: Tensor) -> None:
        blocks = Blocks.of(weight.shape, self.granularity, self.cluster_dim)
        scale = _clustering.channel_scale(weight) if self.enable_per_channel_scale else None
        found = _clustering.cluster(self, weight, blocks, scale)
        self._blocks, self.per_channel_scale = blocks, scale
        self.indices = found.indices
        self.set_centroids(found.centroids.to(weight.dtype))
        self._centroids_initialized = True
        self._indices_stale = False

    def _invalidate(self) -> None:
        self._centroids_initialized = False
        self._indices_stale = True

    def _centroids(self) -> Tensor:
        if self.centroids is None:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has no palettes yet: run a forward, or load a state_dict that has them"
            )
        return self.centroids

    def _as_lut(self, palettes: Tensor) -> Tensor:
        leading = self._blocks.lut_shape if self._blocks is not None else (palettes.shape[0], 1)
        return palettes.reshape(*leading, *palettes.shape[1:])

    def _lut_qparam(self, position: int) -> Tensor | None:
        if self._lut_fake_quantizer is None:
            return None
        centroids = self._centroids()
        qparam = self._lut_fake_quantizer.qparams_calculator(_rows(centroids.detach()))[position]
        return None if qparam is None else self._as_lut(qparam.reshape(-1, 1, 1))

    def _scale_for(self, weight: Tensor) -> Tensor:
        assert self.per_channel_scale is not None
        return self.per_channel_scale.reshape(-1, *[1] * (weight.dim() - 1))

    def _check_state_fits(self, blocks: Blocks) -> None:
        if not self._centroids_initialized or self.indices is None or self.centroids is None:
            return
        expected = (blocks.shape[0] // self.cluster_dim, *blocks.shape[1:])
        if tuple(self.indices.shape) != expected or self.centroids.shape[0] != blocks.count:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has shape {blocks.shape}, but its palettes are for another: indices "
                f"{tuple(self.indices.shape)}, {self.centroids.shape[0]} palettes. To cluster it anew, call "
                f"enable_fake_palett(reinitialize=True)"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        error_msgs: list[str] = lists[2]
        problems = _clustering.state_problems(self, state_dict, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        for name in ("indices", "per_channel_scale", "centroids"):
            loaded = state_dict.get(prefix + name)
            if loaded is not None:
                self._make_room(name, loaded)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._switch.update(self.fake_palett_enabled)
        self._centroids_initialized = self.centroids is not None and self.indices is not None
        self._indices_stale = False
        self._blocks = None
        if self._centroids_initialized:
            self._training_strategy.on_palette_computed(self)

    def _make_room(self, name: str, loaded: Tensor) -> None:
        """Give a buffer the shape of the checkpoint's, which is then copied into it."""
        old: Tensor | None = getattr(self, name)
        if old is None or old.shape != loaded.shape:
            dtype = torch.uint8 if name == "indices" else (loaded if old is None else old).dtype
            device = self.fake_palett_enabled.device
            self._parameters.pop(name, None)
            self.register_buffer(name, torch.empty(loaded.shape, dtype=dtype, device=device))


def _lut_quantizer(spec: QuantizationSpec | None) -> FakeQuantizeImplBase | None:
    """The fake quantizer for palettes as rows of a matrix: one scale a row."""
    if spec is None:
        return None
    per_row = copy.copy(spec).model_copy(update={"granularity": PerChannelGranularity(axis=0)})
    return QuantizationComponentFactory.construct(per_row, CompressionTargetTensor.LUT)


def _rows(centroids: Tensor) -> Tensor:
    """Palettes of scalars as a matrix; palettes of vectors as they are."""
    return centroids.squeeze(-1) if centroids.shape[-1] == 1 else centroids
