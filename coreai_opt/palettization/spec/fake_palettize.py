"""The base of palettization simulators."""

import logging
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from coreai_opt._sharding.layout import is_sharded, whole, with_whole
from coreai_opt._utils.spec_utils import PartialConstructor, with_args
from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase, Storage
from coreai_opt.palettization.spec._storage import storage_of
from coreai_opt.palettization.spec._switch import MirroredSwitch
from coreai_opt.palettization.spec.errors import (
    _IncompatibleClusterDimError,
    _IncompatibleGranularityError,
)
from coreai_opt.palettization.spec.granularity import PalettizationGranularity
from coreai_opt.quantization.spec import QuantizationSpec

__all__: list[str] = []

logger = logging.getLogger(__name__)

# Numbers of bits that the indices' dtype, uint8, holds.
_MOST_BITS = 8


class _FakePalettizeImplBase(CompressionSimulatorBase):
    """A module that replaces a weight's values by those of its palettes.

    The buffer ``fake_palett_enabled`` (uint8, one element) switches it on or off. A module whose weight
    cannot be cut into the blocks asked for disables itself for good, with a warning in the log.

    Args:
        n_bits: bits of an index into a palette, 1 to 8.
        lut_qspec: quantization of the palettes.
        granularity: which elements share a palette.
        cluster_dim: length of the vectors that an index stands for.
        enable_per_channel_scale: cluster the weight divided by each channel's largest magnitude.

    Raises:
        ValueError: ``n_bits`` or ``cluster_dim`` is out of range.
    """

    fake_palett_enabled: Tensor

    def __init__(
        self,
        n_bits: int,
        lut_qspec: QuantizationSpec | None,
        granularity: PalettizationGranularity,
        cluster_dim: int,
        enable_per_channel_scale: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not 1 <= n_bits <= _MOST_BITS:
            raise ValueError(f"n_bits must be from 1 to {_MOST_BITS}; got {n_bits}")
        if cluster_dim < 1:
            raise ValueError(f"cluster_dim must be positive; got {cluster_dim}")
        self.n_bits = n_bits
        self.lut_qspec = lut_qspec
        self.granularity = granularity
        self.cluster_dim = cluster_dim
        self.enable_per_channel_scale = enable_per_channel_scale
        self.register_buffer("fake_palett_enabled", torch.ones(1, dtype=torch.uint8))
        self._disabled = False
        self._switch = MirroredSwitch()
        self._switch.adopt(self.fake_palett_enabled)

    @classmethod
    def with_args(cls, **kwargs: Any) -> PartialConstructor["_FakePalettizeImplBase"]:
        """A constructor of the class with ``kwargs`` bound."""
        return with_args(cls, **kwargs)

    @abstractmethod
    def ensure_initialized(self, tensor: Tensor) -> None:
        """Compute the palettes of ``tensor`` unless they are there.

        Raises:
            _IncompatibleGranularityError, _IncompatibleClusterDimError: the specification does not fit.
        """

    @abstractmethod
    def hard_assign(self, weight: Tensor) -> Tensor:
        """The palettized values of ``weight``, without a gradient to it."""

    @abstractmethod
    def forward_enabled(self, tensor: Tensor) -> Tensor:
        """The forward when the module is switched on and has its palettes."""

    @abstractmethod
    def _invalidate(self) -> None:
        """Forget the palettes: the next forward computes them anew."""

    def storage(self, original: Tensor) -> Storage:
        """What is stored of ``original``. See the base class."""
        return storage_of(self, original)

    def is_disabled(self) -> bool:
        """Whether the specification does not fit the weight, so that it passes unchanged."""
        return self._disabled

    def is_on(self) -> bool:
        """Whether the module palettizes, or would if it had its palettes."""
        self._switch.update(self.fake_palett_enabled)
        return self._switch.on and not self._disabled

    def enable_fake_palett(self, enabled: bool = True, reinitialize: bool = False) -> None:
        """Switch palettization on or off.

        Args:
            enabled: whether to palettize.
            reinitialize: compute the palettes anew in the next forward that palettizes.
        """
        self.fake_palett_enabled.fill_(enabled)
        self._switch.on = bool(enabled)
        self._switch.adopt(self.fake_palett_enabled)
        if reinitialize:
            self._invalidate()

    def disable_fake_palett(self) -> None:
        """Switch palettization off."""
        self.enable_fake_palett(False)

    def forward(self, tensor: Tensor) -> Tensor:
        """The palettized values of a weight.

        Args:
            tensor: the weight: float32, bfloat16, float16 or float64.

        Returns:
            A tensor of the same shape and dtype.

        Raises:
            TypeError: the weight is not floating point.
            ValueError: it has values that are not finite, or the sensitivities do not belong to it.
            RuntimeError: it has another shape than the one that the palettes were computed for.
        """
        if not torch.compiler.is_compiling():
            self._switch.update(self.fake_palett_enabled)
        if is_sharded(tensor):
            # k-means, palettes and their gradients are those of the whole weight.
            return with_whole(tensor, self.forward(whole(tensor)))
        if self._disabled or not self._switch.on or not self._try_initialize(tensor):
            return tensor
        return self.forward_enabled(tensor)

    def _try_initialize(self, tensor: Tensor) -> bool:
        """Whether there are palettes; if the specification does not fit the weight, disables the module."""
        try:
            self.ensure_initialized(tensor)
        except (_IncompatibleGranularityError, _IncompatibleClusterDimError) as error:
            logger.warning(
                f"Tensor {self.tensor_fqn!r} (shape: {tuple(tensor.shape)}) incompatible with configured "
                f"spec: {error}. Skipping palettization."
            )
            self._disabled = True
        return not self._disabled

    def _apply(self, fn: Any, recurse: bool = True) -> "_FakePalettizeImplBase":
        # Moving a module changes its buffers' identity, not their values: nothing to read on the device.
        self._switch.update(self.fake_palett_enabled)
        super()._apply(fn, recurse)
        self._switch.adopt(self.fake_palett_enabled)
        return self
