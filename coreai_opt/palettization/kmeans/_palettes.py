"""A simulator's palettes: their state, their quantization, and the look-up table that they make."""

from typing import Any

import torch
from torch import Tensor

from coreai_opt._sharding.layout import is_sharded, whole, with_whole
from coreai_opt.config.spec.factory import CompressionTargetTensor
from coreai_opt.palettization.kmeans._blocks import Blocks
from coreai_opt.palettization.kmeans._points import WeightPoints
from coreai_opt.palettization.kmeans._sparsity import DENSE
from coreai_opt.palettization.spec.granularity import PalettizationGranularity
from coreai_opt.quantization.spec import (
    PerChannelGranularity,
    QuantizationComponentFactory,
    QuantizationSpec,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["PaletteState"]

# What a checkpoint has of a simulator with palettes, and which of it can be found from the weight.
_PALETTE_PARTS = ("indices", "per_channel_scale", "centroids")
_OPTIONAL = ("indices", "per_channel_scale")


class PaletteState(WeightPoints):
    """A simulator with palettes, which a checkpoint may bring.

    State, once there are palettes: ``centroids`` ``[blocks, 2 ** n_bits, cluster_dim]`` in the weight's
    dtype, ``indices`` (uint8) of the weight's shape with axis 0 divided by ``cluster_dim`` (of a pruned
    weight's vectors: one after another, ``[vectors]``), and ``per_channel_scale`` ``[channels, 1]`` if asked
    for. A checkpoint may lack the latter two: then they are found from the weight.
    """

    indices: Tensor | None
    centroids: Tensor | None

    def __init__(
        self,
        n_bits: int,
        lut_qspec: QuantizationSpec | None,
        granularity: PalettizationGranularity,
        cluster_dim: int,
        enable_per_channel_scale: bool,
        sparsity_detection_threshold: float | None = None,
    ) -> None:
        super().__init__(
            n_bits,
            lut_qspec,
            granularity,
            cluster_dim,
            enable_per_channel_scale,
            sparsity_detection_threshold=sparsity_detection_threshold,
        )
        self._lut_fake_quantizer = _lut_quantizer(lut_qspec)
        self.register_buffer("indices", None)
        self.register_buffer("per_channel_scale", None)
        self.register_buffer("centroids", None)
        self._centroids_initialized = False
        self._indices_stale = False

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
        if self._lut_fake_quantizer is None:
            return None
        return self._as_lut(self.quantize_lut(self.stored_palettes()))

    @property
    def lut_quantization_scale(self) -> Tensor | None:
        """Scale of each palette, shaped as the look-up table with ones at its end; None if unquantized."""
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
        quantizer = self._lut_fake_quantizer
        if quantizer is None:
            raise RuntimeError("the specification has no lut_qspec: there is nothing to quantize palettes to")
        rows = _rows(lut)
        return quantizer.quantize(rows, *quantizer.qparams_calculator(rows.detach())).reshape(lut.shape)

    def palettes(self) -> Tensor:
        """The palettes as they are used, ``[blocks, 2 ** n_bits, cluster_dim]``, with gradients.

        Raises:
            RuntimeError: there are none yet.
        """
        centroids = self.stored_palettes()
        if self._lut_fake_quantizer is None:
            return centroids
        quantized: Tensor = self._lut_fake_quantizer(_rows(centroids))
        return quantized.reshape(centroids.shape)

    def stored_palettes(self) -> Tensor:
        """The palettes before quantization, whole also if sharded; RuntimeError if there are none yet."""
        if self.centroids is None:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has no palettes yet: run a forward, or load a state_dict that "
                f"has them"
            )
        return whole(self.centroids)

    def set_palettes(self, centroids: Tensor) -> None:
        """Put new palettes in the place of the old ones, as the buffer or parameter that those are."""
        old = self.centroids
        if isinstance(old, torch.nn.Parameter) and old.shape == centroids.shape:
            self.overwrite_palettes(centroids)
        else:
            self._parameters.pop("centroids", None)
            self.register_buffer("centroids", centroids)

    @torch.no_grad()
    def overwrite_palettes(self, centroids: Tensor) -> None:
        """Write other palettes into those that there are, of the same shape."""
        assert self.centroids is not None
        new = with_whole(self.centroids, centroids) if is_sharded(self.centroids) else centroids
        self.centroids.copy_(new)

    def index_rows(self) -> Tensor:
        """The stored indices in the shape that belongs to :meth:`points`."""
        assert self.indices is not None
        if self._stored_positions is None:
            return self.indices
        return self.indices.reshape(len(self._stored_positions), -1)

    def _check_state_fits(self, blocks: Blocks) -> None:
        if not self._centroids_initialized or self.centroids is None:
            return
        expected = (blocks.shape[0] // self.cluster_dim, *blocks.shape[1:])
        if self._stored_positions is not None:
            expected = (self._stored_positions.numel() // self.cluster_dim,)
        shape = None if self.indices is None or self._indices_stale else tuple(self.indices.shape)
        if shape not in (None, expected) or self.centroids.shape[0] != blocks.count:
            raise RuntimeError(
                f"Tensor {self.tensor_fqn!r} has shape {blocks.shape}, but its palettes are for another: "
                f"indices {shape}, {self.centroids.shape[0]} palettes. To cluster it anew, call "
                f"enable_fake_palett(reinitialize=True)"
            )

    def _as_lut(self, palettes: Tensor) -> Tensor:
        leading = self._blocks.lut_shape if self._blocks is not None else (palettes.shape[0], 1)
        return palettes.reshape(*leading, *palettes.shape[1:])

    def _lut_qparam(self, position: int) -> Tensor | None:
        if self._lut_fake_quantizer is None:
            return None
        rows = _rows(self.stored_palettes().detach())
        qparam = self._lut_fake_quantizer.qparams_calculator(rows)[position]
        return None if qparam is None else self._as_lut(qparam.reshape(-1, 1, 1))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._indices_stale:
            destination.pop(f"{prefix}indices", None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = _with_centroids(state_dict, prefix)
        problems = self._state_problems(state_dict, prefix)
        if problems:
            error_msgs.extend(problems)
            return
        found = {name: state_dict.get(prefix + name) for name in _PALETTE_PARTS}
        if found["centroids"] is None:
            # Indices and scales mean nothing without their palettes.
            state_dict = {key: state_dict[key] for key in state_dict if key[len(prefix) :] not in _OPTIONAL}
        else:
            for name, loaded in found.items():
                if loaded is not None:
                    self._make_room(name, loaded)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key not in {prefix + name for name in _OPTIONAL}]
        self._switch.update(self.fake_palett_enabled)
        if found["centroids"] is not None:
            self._adopt(found)

    def _adopt(self, found: dict[str, Tensor | None]) -> None:
        """What follows from palettes that have been loaded."""
        without_scale = self.enable_per_channel_scale and found["per_channel_scale"] is None
        if without_scale:
            self.per_channel_scale = None
        self._centroids_initialized = True
        self._indices_stale = without_scale or found["indices"] is None
        self._blocks = None
        # Which values are zero may have changed with the palettes.
        self._set_sparsity(DENSE, known=False)
        quantizer = self._lut_fake_quantizer
        if quantizer is not None and not _has_qparams(quantizer):
            # Observes the palettes; parameters of the quantizer in the checkpoint are loaded afterwards.
            with torch.no_grad():
                self.palettes()

    def _state_problems(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Why the palettes in a ``state_dict`` do not fit the specification; empty if they do."""
        problems = []
        centroids, indices = state_dict.get(f"{prefix}centroids"), state_dict.get(f"{prefix}indices")
        expected = (2**self.n_bits, self.cluster_dim)
        if centroids is not None and (centroids.dim() != 3 or tuple(centroids.shape[1:]) != expected):
            problems.append(
                f"{prefix}centroids has shape {tuple(centroids.shape)}; n_bits={self.n_bits} and "
                f"cluster_dim={self.cluster_dim} make it (blocks, {expected[0]}, {expected[1]})"
            )
        if indices is not None and (indices.is_floating_point() or indices.is_complex()):
            problems.append(f"{prefix}indices has dtype {indices.dtype}; indices are integers")
        if not self.enable_per_channel_scale and f"{prefix}per_channel_scale" in state_dict:
            problems.append(
                f"{prefix}per_channel_scale is in the checkpoint, but enable_per_channel_scale is off"
            )
        return problems

    def _make_room(self, name: str, loaded: Tensor) -> None:
        """Give a buffer the shape of the checkpoint's, which is then copied into it."""
        old: Tensor | None = getattr(self, name)
        if old is None or old.shape != loaded.shape:
            dtype = torch.uint8 if name == "indices" else (loaded if old is None else old).dtype
            device = self.fake_palett_enabled.device
            self._parameters.pop(name, None)
            self.register_buffer(name, torch.empty(loaded.shape, dtype=dtype, device=device))


def _with_centroids(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The state with palettes as ``centroids`` where an old checkpoint has them as ``lut`` (4 axes)."""
    lut = state_dict.get(f"{prefix}lut")
    if lut is None or f"{prefix}centroids" in state_dict or lut.dim() != 4:
        return state_dict
    renamed = {key: value for key, value in state_dict.items() if key != f"{prefix}lut"}
    return renamed | {f"{prefix}centroids": lut.flatten(0, 1)}


def _lut_quantizer(spec: QuantizationSpec | None) -> FakeQuantizeImplBase | None:
    """The fake quantizer for palettes as rows of a matrix: one scale a row."""
    if spec is None:
        return None
    per_row = spec.model_copy(update={"granularity": PerChannelGranularity(axis=0)})
    return QuantizationComponentFactory.construct(per_row, CompressionTargetTensor.LUT)


def _has_qparams(quantizer: FakeQuantizeImplBase) -> bool:
    scale = getattr(quantizer.qparams_calculator, "scale", None)
    return not isinstance(scale, Tensor) or scale.numel() > 0


def _rows(centroids: Tensor) -> Tensor:
    """Palettes of scalars as a matrix; palettes of vectors as they are."""
    return centroids.squeeze(-1) if centroids.shape[-1] == 1 else centroids
