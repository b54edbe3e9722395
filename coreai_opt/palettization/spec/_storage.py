"""What a palettized weight takes as it is stored."""

from typing import Any

import torch
from torch import Tensor

from coreai_opt.config.spec.compression_simulator import Storage
from coreai_opt.quantization.spec import QuantizationScheme
from coreai_opt.quantization.spec._numbers import bits_of

__all__ = ["storage_of"]


def storage_of(simulator: Any, weight: Tensor) -> Storage:
    """Indices, palettes, and the elements that are stored, for a simulator of palettes."""
    mask = getattr(simulator, "_sparsity_mask", None)
    kept = None if mask is None else int(torch.count_nonzero(mask))
    return Storage(simulator.n_bits / simulator.cluster_dim, _palette_bits(simulator, weight), kept)


def _palette_bits(simulator: Any, weight: Tensor) -> int:
    """Palettes, their own quantization parameters, and the scales of channels."""
    bits_of_weight = weight.element_size() * 8
    centroids = getattr(simulator, "centroids", None)
    blocks = (
        centroids.shape[0]
        if isinstance(centroids, Tensor)
        else simulator.granularity.num_blocks_to_cluster(weight)
    )
    entries = blocks * 2**simulator.n_bits * simulator.cluster_dim
    lut_spec = simulator.lut_qspec
    bits = entries * (bits_of_weight if lut_spec is None else bits_of(lut_spec.dtype))
    if lut_spec is not None:
        # The scale of a palette is float32 whatever the weight is.
        bits += blocks * 32
        if lut_spec.qscheme == QuantizationScheme.ASYMMETRIC:
            bits += blocks * bits_of(lut_spec.dtype)
    if simulator.enable_per_channel_scale:
        bits += weight.shape[0] * bits_of_weight
    return bits
