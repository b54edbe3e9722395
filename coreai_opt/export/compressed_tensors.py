"""Quantized weights as the package compressed-tensors stores them, and back.

The weight of a layer becomes several tensors, whose names and contents follow from a *format*:

================================ =====================================================================
``pack-quantized``               integers of 1 to 8 bits in the bits of int32 words, along the last axis
``int-quantized``                integers, one a byte
``float-quantized``              float8 (e4m3)
``mxfp4-pack-quantized``         float4 (e2m1), two a byte; scales are exponents of two, for blocks of 32
``nvfp4-pack-quantized``         the same; scales are e4m3 for blocks of 16, and divided by one for the tensor
``mxfp8-quantized``              float8 (e4m3); scales likewise
================================ =====================================================================
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_opt.export import two_level_scales
from coreai_opt.export.records import Affine

__all__ = [
    "FORMATS",
    "NVFP4",
    "PACKED",
    "Stored",
    "decoded",
    "pack_words",
    "parameters_of",
    "stored",
    "unpack_words",
]

PACKED, _INT, _FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_NAIVE = "naive-quantized"
_MXFP4, _MXFP8 = "mxfp4-pack-quantized", "mxfp8-quantized"
NVFP4 = "nvfp4-pack-quantized"
FORMATS = (PACKED, _INT, _FLOAT, _NAIVE, _MXFP4, _MXFP8, NVFP4)
_GLOBAL_SCALE = "weight_global_scale"
# What a layer has beside its scales; elsewhere "weight".
_NAMES = {
    PACKED: ["weight_packed", "weight_shape"],
    _MXFP4: ["weight_packed"],
    NVFP4: ["weight_packed", _GLOBAL_SCALE],
}
_WORD = 32
_MX_GROUP, _NV_GROUP = 32, 16
# Values that are packed at a time, so that what lies in between takes little memory.
_PART = 1 << 20
_FLOAT4 = torch.float4_e2m1fn_x2
_FLOAT4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Stored:
    """A layer's weight in a checkpoint.

    Attributes:
        tensors: by name within the layer.
        format: which format they are in.
        arguments: how the weight is quantized, as the checkpoint's configuration says it.
    """

    tensors: dict[str, Tensor]
    format: str
    arguments: dict[str, Any]


def stored(record: Affine, name: str, with_activations: bool) -> Stored:
    """A quantized weight as a checkpoint holds it.

    Args:
        record: the quantized weight, a matrix.
        name: its qualified name, for messages.
        with_activations: whether the layer's inputs are quantized, too.

    Raises:
        ValueError: there is no format for it.
    """
    if record.minval is not None:
        raise ValueError(
            f"{name!r} has the formulation 'minval'; compressed-tensors has zero points: use 'zp'"
        )
    if record.values.dim() != 2:
        raise ValueError(
            f"{name!r} has shape {tuple(record.values.shape)}; compressed-tensors holds the matrices of "
            f"linear layers and embeddings"
        )
    shape = _logical_shape(record)
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, **_strategy(record, shape, name)}
    if record.dtype == _FLOAT4:
        return _mxfp4(record, arguments, name) if record.scale_of_tensor is None else _nvfp4(record, name)
    if record.dtype.is_floating_point:
        return _float8(record, arguments, name)
    return _integers(record, arguments, with_activations, name)


def _logical_shape(record: Affine) -> tuple[int, int]:
    rows, columns = record.values.shape
    return (rows, 2 * columns) if record.dtype == _FLOAT4 else (rows, columns)


def _strategy(record: Affine, shape: tuple[int, int], name: str) -> dict[str, Any]:
    rows, columns = record.scale.shape
    if (rows, columns) == (1, 1):
        return {"strategy": "tensor"}
    if (rows, columns) == (shape[0], 1):
        return {"strategy": "channel"}
    if rows == shape[0]:
        return {"strategy": "group", "group_size": shape[1] // columns}
    if record.dtype.is_floating_point:
        return {"strategy": "block", "block_structure": [shape[0] // rows, shape[1] // columns]}
    raise ValueError(
        f"{name!r} has {rows} x {columns} blocks; compressed-tensors has integers per tensor, per output "
        f"channel (axis 0), and in groups along the inputs (axis 1) of each channel"
    )


def _mxfp4(record: Affine, arguments: dict[str, Any], name: str) -> Stored:
    if arguments.get("group_size") != _MX_GROUP or record.scale.dtype != torch.float8_e8m0fnu:
        raise ValueError(
            f"{name!r} has float4 in other blocks than groups of {_MX_GROUP} along axis 1 with power-of-two "
            f"scales: use PerBlockGranularity(axis=1, block_size={_MX_GROUP})"
        )
    tensors = {"weight_packed": record.values, "weight_scale": record.scale.view(torch.uint8)}
    return Stored(tensors, _MXFP4, {**arguments, "num_bits": 4, "scale_dtype": "torch.uint8"})


def _nvfp4(record: Affine, name: str) -> Stored:
    rows, columns = _logical_shape(record)
    if record.scale.shape != (rows, columns // _NV_GROUP) or columns % _NV_GROUP:
        raise ValueError(
            f"{name!r} has float4 with e4m3 scales in other blocks than groups of {_NV_GROUP} along axis 1: "
            f"use PerBlockGranularity(axis=1, block_size={_NV_GROUP})"
        )
    assert record.scale_of_tensor is not None
    tensors = {
        "weight_packed": record.values,
        "weight_scale": record.scale,
        _GLOBAL_SCALE: record.scale_of_tensor,
    }
    arguments = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": _NV_GROUP,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    return Stored(tensors, NVFP4, arguments)


def _float8(record: Affine, arguments: dict[str, Any], name: str) -> Stored:
    if record.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name!r} has the dtype {record.dtype}; of float8, compressed-tensors has e4m3")
    if record.scale.dtype != torch.float8_e8m0fnu:
        tensors = {"weight": record.values, "weight_scale": _scale_of(record)}
        return Stored(tensors, _FLOAT, arguments)
    if arguments.get("group_size") != _MX_GROUP:
        raise ValueError(
            f"{name!r} has float8 with power-of-two scales in other blocks than groups of {_MX_GROUP} along "
            f"axis 1: use PerBlockGranularity(axis=1, block_size={_MX_GROUP})"
        )
    tensors = {"weight": record.values, "weight_scale": record.scale.view(torch.uint8)}
    return Stored(tensors, _MXFP8, {**arguments, "scale_dtype": "torch.uint8"})


def _integers(record: Affine, arguments: dict[str, Any], with_activations: bool, name: str) -> Stored:
    label = str(record.dtype).removeprefix("torch.")
    bits = int(label.rpartition("int")[2])
    # Integers are signed there: both the values and the zero point of unsigned ones move down.
    shift = 1 << (bits - 1) if label.startswith("uint") else 0
    values, zero_point = (
        (each.view(torch.uint8) - shift).view(torch.int8) if shift else each for each in _values(record)
    )
    symmetric = not zero_point.any()
    arguments = {**arguments, "num_bits": bits, "type": "int", "symmetric": symmetric}
    # Loaders do not agree on packed zero points: where bytes do, those of 8 bits are not packed.
    if with_activations or (bits == 8 and not symmetric):
        if bits != 8:
            raise ValueError(
                f"{name!r} has {bits} bits, and its inputs are quantized: compressed-tensors has weights of "
                f"8 bits then"
            )
        tensors = {"weight": values, "weight_scale": _scale_of(record)}
        return Stored(
            tensors | ({} if symmetric else {"weight_zero_point": _flat(zero_point)}), _INT, arguments
        )
    if not symmetric and arguments["strategy"] == "tensor":
        # Zero points are packed for channels and groups alone: a scale a channel says the same.
        count = values.shape[0]
        arguments["strategy"] = "channel"
        zero_point, scale = zero_point.expand(count, 1), record.scale.expand(count, 1).contiguous()
    else:
        scale = _scale_of(record)
    tensors = {
        "weight_packed": pack_words(values, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(values.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_words(zero_point.T, bits).T.contiguous()
    return Stored(tensors, PACKED, arguments)


def _values(record: Affine) -> tuple[Tensor, Tensor]:
    assert record.zero_point is not None
    return record.values, record.zero_point


def _scale_of(record: Affine) -> Tensor:
    return _flat(record.scale)


def _flat(grid: Tensor) -> Tensor:
    return grid.reshape(1) if grid.numel() == 1 else grid


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Signed integers in the bits of int32 words, row by row, the first one in the lowest bits.

    Args:
        values: int8 ``[rows, columns]``.
        bits: of each of them, 1 to 8.

    Returns:
        int32 ``[rows, ceil(columns * bits / 32)]``.
    """
    rows, columns = values.shape
    padding, words = -columns % _WORD, math.ceil(columns * bits / _WORD)
    packed = torch.empty(rows, words, dtype=torch.int32, device=values.device)
    at_a_time = max(1, _PART // max(columns, 1))
    for part, place in zip(values.split(at_a_time), packed.split(at_a_time), strict=True):
        codes = part.view(torch.uint8) ^ (1 << (bits - 1))  # the smallest integer becomes 0, in the low bits
        if padding:
            codes = torch.nn.functional.pad(codes, (0, padding))
        octets = coreai_kernels.pack_bits(codes, bits)
        place.copy_(octets.view(torch.int32).reshape(len(part), -1)[:, :words])
    return packed


def unpack_words(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The integers that :func:`pack_words` has packed: int8 ``[rows, columns]``."""
    missing = math.ceil(columns / _WORD) * bits - packed.shape[1]  # words, up to which rows begin anew
    octets = torch.nn.functional.pad(packed, (0, missing)).contiguous().view(torch.uint8)
    codes = coreai_kernels.unpack_bits(octets.flatten(), bits, octets.numel() * 8 // bits)
    return (codes.reshape(packed.shape[0], -1)[:, :columns] - (1 << (bits - 1))).view(torch.int8)


def decoded(tensors: dict[str, Tensor], fmt: str, arguments: dict[str, Any], name: str) -> Tensor:
    """The dense weight of a layer in a checkpoint, in the dtype of its scales.

    Powers of two are bfloat16 here, as they are in the package. Scales of two levels are float32, where the
    package rounds the weight to bfloat16 after.

    Args:
        tensors: by name within the layer.
        fmt: their format.
        arguments: how the weight is quantized.
        name: the layer's qualified name, for messages.

    Raises:
        ValueError: the format is unknown, or a tensor is missing.
    """
    if fmt not in FORMATS:
        raise ValueError(f"{name!r} is stored in the format {fmt!r}; known are {', '.join(FORMATS)}")
    needed = ["weight_scale", *_NAMES.get(fmt, ["weight"])]
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise ValueError(f"{name!r} is stored in the format {fmt!r}, but {missing} are missing")
    scale, zero_point = parameters_of(tensors, fmt, arguments)
    if fmt == PACKED:
        columns = int(tensors["weight_shape"][1])
        values = unpack_words(tensors["weight_packed"], int(arguments["num_bits"]), columns)
    elif fmt in (_MXFP4, NVFP4):
        values = _unpacked_float4(tensors["weight_packed"])
    else:
        values = tensors["weight"]
    grid = scale.reshape(1, 1) if scale.numel() == 1 else scale
    values = values.to(scale.dtype)
    if zero_point is not None:
        values = values - _spread(zero_point.reshape(grid.shape).to(scale.dtype), values.shape)
    return values * _spread(grid, values.shape)


def parameters_of(
    tensors: dict[str, Tensor], fmt: str, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The scales of a layer's weight in a checkpoint, and its zero points; see :func:`decoded`."""
    scale = tensors["weight_scale"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu).to(torch.bfloat16)
    if _GLOBAL_SCALE in tensors:
        return two_level_scales.joined(scale, tensors[_GLOBAL_SCALE]), None
    zero_point = tensors.get("weight_zero_point")
    if zero_point is not None and fmt == PACKED:
        rows = int(tensors["weight_shape"][0])
        zero_point = unpack_words(zero_point.T, int(arguments["num_bits"]), rows).T
    return scale, zero_point


def _unpacked_float4(packed: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    magnitudes = torch.tensor(_FLOAT4_VALUES, device=packed.device)[(codes & 7).long()]
    return torch.where(codes >= 8, -magnitudes, magnitudes)


def _spread(grid: Tensor, shape: torch.Size) -> Tensor:
    """The value of each element's block."""
    for axis in range(2):
        if grid.shape[axis] not in (1, shape[axis]):
            grid = grid.repeat_interleave(math.ceil(shape[axis] / grid.shape[axis]), axis)
            grid = grid.narrow(axis, 0, shape[axis])
    return grid
