"""Compressed tensors as Core ML's converter reads them: dense weights, and metadata beside them.

The metadata of a weight are buffers of the module that owns it, ``_COREML_/<weight>/<key>``. The converter
takes indices, quantized values and masks from the weight itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coreai_opt.common import CoreMLExportError
from coreai_opt.export.records import Affine, QuantizedActivation, Sparse, WeightRecord, int_min

__all__ = ["activation_module", "add_metadata", "check_palette", "mark", "metadata_of"]

_PREFIX = "_COREML_"
_VERSION = 1
_PRUNING, _PALETTIZATION, _QUANTIZATION = 1, 2, 3
_TABLE_DTYPES = (torch.int8, torch.uint8)


def mark(model: nn.Module) -> None:
    """Note on the model that it holds metadata, in which version."""
    model.register_buffer(f"{_PREFIX}/metadata_version", torch.tensor(_VERSION))


def metadata_of(record: WeightRecord, name: str) -> dict[str, Tensor]:
    """What the converter needs to know of a compressed weight, by key.

    Args:
        record: the compressed weight.
        name: its qualified name, for messages.

    Raises:
        ValueError: Core ML cannot express a palette with zeros left out as this one has.
    """
    if isinstance(record, Sparse):
        return {"compression_type": _types(_PRUNING)}
    if isinstance(record, Affine):
        return _of_quantized(_bits(record), record.scale, record.zero_point)
    if (
        record.lut_scale is not None
        and record.n_bits == 8
        and record.cluster_dim == 1
        and record.mask is None
    ):
        return _of_quantized(8, record.lut_scale, record.lut_zero_point)
    types = [_PALETTIZATION]
    metadata: dict[str, Tensor] = {"compression_type": _types()}
    if record.mask is not None and record.mask.any():
        if record.cluster_dim > 1 or record.lut_scale is not None:
            raise ValueError(
                f"CoreML export does not support palettes with zeros left out and vectors or quantized "
                f"tables, as {name!r} has: use cluster_dim=1 and lut_qspec=None, or "
                f"sparsity_detection_threshold=None"
            )
        types.insert(0, _PRUNING)
    if record.lut_scale is not None:
        types.append(_QUANTIZATION)
        trailing = (*record.lut_scale.shape, 1, 1)
        quantized = _of_quantized(8, record.lut_scale.reshape(trailing), record.lut_zero_point)
        metadata |= {**quantized, "zero_point": quantized["zero_point"].reshape(trailing)}
    metadata["lut"] = record.dequantized_lut
    if record.channel_scale is not None:
        metadata["palettization_scale"] = record.channel_scale
    if record.cluster_dim > 1:
        metadata["vector_axis"] = torch.tensor(0)
    return {**metadata, "compression_type": _types(*types)}


def _of_quantized(bits: int, scale: Tensor, zero_point: Tensor | None) -> dict[str, Tensor]:
    if zero_point is None:
        raise ValueError("Core ML quantizes to integers, with zero points")
    return {
        "compression_type": _types(_QUANTIZATION),
        "quantization_n_bits": torch.tensor(bits),
        "quantization_scale": scale.float(),
        "zero_point": zero_point,
    }


def _bits(record: Affine) -> int:
    return int(str(record.dtype).rpartition("int")[2])


def _types(*codes: int) -> Tensor:
    return torch.tensor(codes, dtype=torch.int64)


def add_metadata(module: nn.Module, attribute: str, metadata: dict[str, Tensor]) -> None:
    """Put metadata on the module that owns a weight, in the place of those that there are.

    A weight that was pruned before stays sparse when it is quantized, as zeros are quantized to zero.
    """
    prefix = f"{_PREFIX}/{attribute}/"
    before = module._buffers.get(f"{prefix}compression_type")
    types = metadata["compression_type"].tolist()
    if before is not None and before.tolist() == [_PRUNING] and types == [_QUANTIZATION]:
        metadata = {**metadata, "compression_type": _types(_PRUNING, *types)}
    for name in [name for name in module._buffers if name.startswith(prefix)]:
        delattr(module, name)
    for key, value in metadata.items():
        module.register_buffer(prefix + key, value)


def check_palette(name: str, features: Sequence[str], lut_dtype: torch.dtype | None) -> None:
    """Raise unless Core ML has palettes with these features together.

    Args:
        name: the weight's qualified name.
        features: which of cluster_dim, lut_qspec, enable_per_channel_scale the specification uses.
        lut_dtype: what tables are quantized to; None for not at all.

    Raises:
        CoreMLExportError: it has not.
    """
    if lut_dtype is not None and lut_dtype not in _TABLE_DTYPES:
        raise CoreMLExportError(
            f"CoreML export does not support tables of {lut_dtype}, as {name!r} has: use int8 or uint8"
        )
    if len(features) > 1:
        raise CoreMLExportError(
            f"CoreML export does not support {' with '.join(features)}, as {name!r} has: use one of them"
        )


class Quantize(nn.Module):
    """Quantizes an activation to 8-bit integers, in torch's own quantized dtypes."""

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        dtype: torch.dtype,
        lowest: float | None,
        highest: float | None,
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.dtype = dtype
        self.lowest = lowest
        self.highest = highest

    def forward(self, tensor: Tensor) -> Tensor:
        """Quantized values of ``tensor``."""
        if self.lowest is not None or self.highest is not None:
            tensor = tensor.clamp(self.lowest, self.highest)
        return torch.quantize_per_tensor(tensor, self.scale, self.zero_point, self.dtype)


class Dequantize(nn.Module):
    """Values that a quantized activation stands for."""

    def forward(self, tensor: Tensor) -> Tensor:
        """The values."""
        return tensor.dequantize()


def activation_module(record: QuantizedActivation, shape: torch.Size) -> nn.Module:
    """A sequence of ``quantize`` and ``dequantize`` in the place of an activation's simulator.

    Args:
        record: how the activation is quantized: to int8 or uint8, with a single scale.
        shape: the shape of the simulator's parameters, which the buffers have, too.
    """
    assert record.zero_point is not None
    dtype = torch.qint8 if int_min(record.dtype) < 0 else torch.quint8
    lowest, highest = (None if each is None else float(each) for each in (record.lowest, record.highest))
    scale, zero_point = record.scale.reshape(shape), record.zero_point.reshape(shape)
    pair = nn.Sequential()
    pair.add_module("quantize", Quantize(scale, zero_point, dtype, lowest, highest))
    pair.add_module("dequantize", Dequantize())
    return pair
