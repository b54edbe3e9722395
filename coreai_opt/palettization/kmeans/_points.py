"""What of a weight its palettes stand for: all of it or, of a pruned one, the values that were kept."""

from typing import Any

import torch
from torch import Tensor

from coreai_opt.palettization.kmeans._blocks import Blocks
from coreai_opt.palettization.kmeans._sparsity import DENSE, Sparsity, find_sparsity, gathered, scattered
from coreai_opt.palettization.spec.errors import (
    _IncompatibleClusterDimError,
    _IncompatibleGranularityError,
)
from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase

__all__ = ["WeightPoints"]


class WeightPoints(_FakePalettizeImplBase):
    """A simulator that knows the zeros of its weight, and the scales of its channels.

    A weight is looked at once, before its palettes are computed or after they are loaded. If a share of
    ``sparsity_detection_threshold`` is zero, these zeros stay, whatever the weight becomes: what is
    palettized is its product with a mask, and so is the result. Neither mask nor finding is in a checkpoint.

    Args:
        sparsity_detection_threshold: 0 to 1; None for weights without a mask. Others: see the base class.

    Raises:
        ValueError: it is out of range.
    """

    per_channel_scale: Tensor | None
    _sparsity_mask: Tensor | None
    _stored_positions: Tensor | None
    _reserving_blocks: Tensor | None
    _blocks: Blocks | None

    def __init__(self, *args: Any, sparsity_detection_threshold: float | None = None) -> None:
        super().__init__(*args)
        if sparsity_detection_threshold is not None and not 0 <= sparsity_detection_threshold <= 1:
            raise ValueError(
                f"sparsity_detection_threshold must be from 0 to 1; got {sparsity_detection_threshold}"
            )
        self.sparsity_detection_threshold = sparsity_detection_threshold
        self._set_sparsity(DENSE, known=False)

    def check_compatible(self, weight: Tensor) -> bool:
        """Whether the granularity and the vectors fit the shape of ``weight``. Reads no values.

        Vectors of a weight that is known to be pruned are stored values, so that no shape is unfit for them.
        """
        try:
            self._grid(weight.shape)
        except (_IncompatibleGranularityError, _IncompatibleClusterDimError):
            return False
        return True

    def detect_sparsity(self, weight: Tensor) -> None:
        """Find out which zeros of ``weight`` stay, unless that is known. Waits for the device, once.

        Raises:
            _IncompatibleGranularityError: the specification does not fit.
            ValueError: the values that are kept cannot be stored as vectors.
        """
        if self._sparsity_detected:
            return
        found = DENSE
        if self.sparsity_detection_threshold is not None and weight.numel():
            blocks = Blocks.of(weight.shape, self.granularity, 1)
            try:
                found = find_sparsity(
                    weight.detach(), self.sparsity_detection_threshold, blocks, self.cluster_dim
                )
            except ValueError as error:
                raise ValueError(f"Tensor {self.tensor_fqn!r} cannot be clustered: {error}") from error
        self._set_sparsity(found, known=True)

    @property
    def sparsity(self) -> Sparsity:
        """The zeros of the weight that stay, as far as they are known."""
        return Sparsity(self._sparsity_mask, self._stored_positions, self._reserving_blocks)

    def blocks(self, weight: Tensor) -> Blocks:
        """The grid of the weight's blocks.

        Raises:
            RuntimeError: the palettes that there are do not fit the weight.
        """
        blocks = self._blocks
        if blocks is None or blocks.shape != tuple(weight.shape):
            blocks = self._grid(weight.shape)
            self._check_state_fits(blocks)
            self._blocks = blocks
        return blocks

    def point_blocks(self, weight: Tensor) -> Blocks:
        """The grid of the blocks of :meth:`points`."""
        blocks, positions, dim = self.blocks(weight), self._stored_positions, self.cluster_dim
        if positions is None:
            return blocks
        count, vectors = len(positions), positions.shape[1] // dim
        return Blocks((count * dim, vectors), (dim, vectors), dim)

    def points(self, weight: Tensor) -> Tensor:
        """What the palettes are for: the weight, masked and divided by the scale of each channel.

        For vectors of a pruned weight, the stored ones as columns: ``(blocks * cluster_dim, vectors)``.
        """
        if self._stored_positions is not None:
            return gathered(self.scaled(weight), self._stored_positions, self.cluster_dim)
        return self.scaled(self.masked(weight))

    def restored(self, points: Tensor, weight: Tensor, are_masked: bool = False) -> Tensor:
        """The values, of the shape and dtype of ``weight``, of which these are the :meth:`points`.

        Args:
            points: the points.
            weight: the weight.
            are_masked: whether ``points`` are zero where the weight is masked.
        """
        if self._stored_positions is not None:
            points = scattered(points, self._stored_positions, tuple(weight.shape))
            return self.unscale(points).to(weight.dtype)
        values = self.unscale(points).to(weight.dtype)
        return values if are_masked else self.masked(values)

    def masked(self, weight: Tensor) -> Tensor:
        """The weight times its mask."""
        return weight if self._sparsity_mask is None else weight * self._sparsity_mask

    def scaled(self, weight: Tensor) -> Tensor:
        """The weight divided by the scale of each channel."""
        return weight if self.per_channel_scale is None else weight / self._scale_for(weight)

    def unscale(self, values: Tensor) -> Tensor:
        """Values multiplied by the scale of each channel."""
        return values if self.per_channel_scale is None else values * self._scale_for(values)

    def held_entries(self) -> Tensor | None:
        """Entries that stay zero whatever palettes become, bool ``(blocks, 2 ** n_bits, 1)``; None for none.

        A group that keeps fewer values than the fullest stores zeros besides, which look up its entry 0.
        """
        centroids: Tensor | None = self.centroids  # type: ignore[assignment]
        if self._reserving_blocks is None or centroids is None:
            return None
        first = torch.arange(centroids.shape[1], device=centroids.device)[:, None] == 0
        return self._reserving_blocks[:, None, None] & first & (centroids.detach() == 0)

    def _grid(self, shape: torch.Size) -> Blocks:
        return Blocks.of(
            shape, self.granularity, 1 if self._stored_positions is not None else self.cluster_dim
        )

    def _check_state_fits(self, blocks: Blocks) -> None:
        """RuntimeError unless the palettes that there are belong to such blocks."""

    def _set_sparsity(self, found: Sparsity, known: bool) -> None:
        self.register_buffer("_sparsity_mask", found.mask, persistent=False)
        self.register_buffer("_stored_positions", found.positions, persistent=False)
        self.register_buffer("_reserving_blocks", found.reserving, persistent=False)
        self._sparsity_detected = known
        self._blocks = None

    def _scale_for(self, weight: Tensor) -> Tensor:
        assert self.per_channel_scale is not None
        return self.per_channel_scale.reshape(-1, *[1] * (weight.dim() - 1))
