"""What a compressed tensor takes in a model that was finalized for a converter."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coreai_opt.export.coreai_modules import ActivationDequantize, ActivationQuantize
from coreai_opt.export.coreml import Dequantize, Quantize
from coreai_opt.export.parametrized import FinalizedWeight
from coreai_opt.quantization.spec._numbers import FLOAT4, bits_of

__all__ = ["ACTIVATION_MODULES", "METADATA_PREFIX", "bits_with_metadata", "finalized_size"]

# What stands in the place of simulators of activations.
ACTIVATION_MODULES = (ActivationQuantize, ActivationDequantize, Quantize, Dequantize)
METADATA_PREFIX = "_COREML_/"
_PRUNED, _PALETTIZED, _QUANTIZED = 1, 2, 3


def finalized_size(weights: Sequence[FinalizedWeight]) -> tuple[int, int]:
    """Elements and bits of a tensor that a model for Core AI holds compressed."""
    sizes = [_size(weight) for weight in weights]
    return max(elements for elements, _ in sizes), sum(bits for _, bits in sizes)


def _size(weight: FinalizedWeight) -> tuple[int, int]:
    stored = dict(weight.named_buffers(recurse=False))
    elements = bits = 0
    lut = stored.get("lut")
    for name, buffer in stored.items():
        if name == "quantized_data":
            dtype = getattr(weight, "input_dtype", None) or buffer.dtype
            # Integers have a zero point or a minimum; without, bytes are pairs of 4-bit floats.
            is_pairs = buffer.dtype == torch.uint8 and not stored.keys() & {"zero_point", "minval"}
            elements = buffer.numel() * (2 if is_pairs else 1)
            bits += elements * (bits_of(FLOAT4) if is_pairs else bits_of(dtype))
        elif name in ("indices", "nonzero_indices"):
            assert lut is not None
            elements = max(elements, buffer.numel() * lut.shape[-1])
            bits += buffer.numel() * (lut.shape[-2] - 1).bit_length()
        elif name == "mask":
            elements = buffer.numel()
            bits += buffer.numel()
        elif name == "zero_point":
            bits += _zero_point_bits(buffer, _value_bits(weight, stored))
        else:
            bits += buffer.numel() * buffer.element_size() * 8
    return elements, bits


def _value_bits(weight: FinalizedWeight, stored: dict[str, Tensor]) -> int:
    dtype: torch.dtype | None = getattr(weight, "input_dtype", None)
    return bits_of(dtype or stored.get("quantized_data", stored.get("lut", torch.empty(0))).dtype)


def _zero_point_bits(zero_point: Tensor, value_bits: int) -> int:
    """Zero points that are all one number need not be stored."""
    if bool((zero_point == zero_point.flatten()[0]).all()):
        return 0
    return zero_point.numel() * value_bits


def bits_with_metadata(module: nn.Module, name: str, tensor: Tensor) -> int | None:
    """Bits of a tensor with metadata for Core ML beside it; None where there are none."""
    prefix = f"{METADATA_PREFIX}{name}/"
    metadata = {
        key.removeprefix(prefix): buffer
        for key, buffer in module.named_buffers(recurse=False)
        if key.startswith(prefix)
    }
    if "compression_type" not in metadata:
        return None
    types = metadata["compression_type"].tolist()
    tensor_bits = tensor.element_size() * 8
    value_bits, extra = float(tensor_bits), 0
    if _PALETTIZED in types:
        lut = metadata["lut"]
        value_bits = (lut.shape[-2] - 1).bit_length() / lut.shape[-1]
        extra += lut.numel() * (8 if _QUANTIZED in types else tensor_bits)
    elif _QUANTIZED in types:
        value_bits = int(metadata["quantization_n_bits"])
    if _QUANTIZED in types:
        # The scales of tables are float32; those of weights have the weight's dtype.
        extra += metadata["quantization_scale"].numel() * (32 if _PALETTIZED in types else tensor_bits)
        extra += _zero_point_bits(metadata["zero_point"], int(metadata["quantization_n_bits"]))
    if "palettization_scale" in metadata:
        extra += metadata["palettization_scale"].numel() * tensor_bits
    dense = math.ceil(tensor.numel() * value_bits)
    if _PRUNED in types:
        kept = int(torch.count_nonzero(tensor))
        dense = min(dense, math.ceil(kept * value_bits) + tensor.numel())
    return dense + extra
