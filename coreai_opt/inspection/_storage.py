"""What one compressed tensor takes, from the simulators that it goes through."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.palettization.spec.fake_palettize import _FakePalettizeImplBase
from coreai_opt.pruning.spec import PruneImplBase
from coreai_opt.quantization.spec import QuantizationFormulation, QuantizationScheme
from coreai_opt.quantization.spec._numbers import bits_of
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["dense_bits", "is_off", "simulated_bits"]


def dense_bits(tensor: Tensor) -> int:
    """The bits of all elements in the tensor's own dtype."""
    return tensor.numel() * tensor.element_size() * 8


def simulated_bits(original: Tensor, simulators: Sequence[CompressionSimulatorBase]) -> int:
    """The bits of a tensor that goes through ``simulators``.

    Raises:
        NotImplementedError: one of them is of a kind that says nothing about its storage.
    """
    value_bits, extra_bits, kept = float(original.element_size() * 8), 0, original.numel()
    for simulator in simulators:
        if is_off(simulator):
            continue
        if isinstance(simulator, PruneImplBase):
            kept = _kept(simulator, original)
        elif isinstance(simulator, FakeQuantizeImplBase):
            value_bits, extra_bits = float(_bits_of_value(simulator)), _parameter_bits(simulator, original)
        elif isinstance(simulator, _FakePalettizeImplBase):
            value_bits = simulator.n_bits / simulator.cluster_dim
            extra_bits = _palette_bits(simulator, original)
            kept = min(kept, _kept_by_palettes(simulator, original))
        else:
            raise NotImplementedError(
                f"bits_per_weight does not know what {type(simulator).__name__} stores for "
                f"{simulator.tensor_fqn!r}"
            )
    dense = math.ceil(original.numel() * value_bits)
    sparse = math.ceil(kept * value_bits) + original.numel()
    return min(dense, sparse) + extra_bits


def is_off(simulator: CompressionSimulatorBase) -> bool:
    """Whether the simulator gave up on its tensor, which passes as it is."""
    disabled = getattr(simulator, "is_disabled", None)
    return bool(disabled() if callable(disabled) else disabled)


def _bits_of_value(simulator: FakeQuantizeImplBase) -> int:
    return simulator.n_bits if simulator.n_bits is not None else bits_of(simulator.dtype)


def _parameter_bits(simulator: FakeQuantizeImplBase, tensor: Tensor) -> int:
    """Scales, and zero points or minima, of all blocks."""
    calculator = simulator.qparams_calculator
    scale = getattr(calculator, "scale", None)
    if isinstance(scale, Tensor) and scale.numel():
        blocks = scale.numel()
    else:
        blocks = tensor.numel() // math.prod(simulator.get_block_size(tensor.shape))
    float_bits = torch.finfo(tensor.dtype).bits
    scale_dtype = calculator.scale_dtype
    bits = blocks * (float_bits if scale_dtype is None else bits_of(scale_dtype))
    if scale_dtype == torch.float8_e4m3fn:
        # The scales of blocks are in units of one float32 scale of the tensor.
        bits += 32
    if simulator.qformulation == QuantizationFormulation.MINVAL:
        bits += blocks * float_bits
    elif simulator.qscheme == QuantizationScheme.ASYMMETRIC:
        bits += blocks * _bits_of_value(simulator)
    return bits


def _palette_bits(simulator: _FakePalettizeImplBase, weight: Tensor) -> int:
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


def _kept(simulator: PruneImplBase, weight: Tensor) -> int:
    mask = simulator.mask if simulator.mask.numel() else simulator.mask_for(weight)
    return int(torch.count_nonzero(mask))


def _kept_by_palettes(simulator: _FakePalettizeImplBase, weight: Tensor) -> int:
    mask = getattr(simulator, "_sparsity_mask", None)
    return weight.numel() if mask is None else int(torch.count_nonzero(mask))
