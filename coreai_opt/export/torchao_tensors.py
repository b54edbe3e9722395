"""Quantized weights as torchao's tensor subclasses: parameters that stay quantized, for inference in torch.

====================== ================================================= ==========================
tensor                 weights                                           layers
====================== ================================================= ==========================
``Int8Tensor``         8 bits, symmetric, per tensor, channel or group   Linear
``Int4OpaqueTensor``   4 bits, groups of 32, 64 or 128, on the CPU,      Linear
                       output features in sixteens; two in a byte
``IntxUnpacked...``    all other integers of up to 8 bits, one a byte    Linear, Embedding, Conv2d
``Float8Tensor``       float8                                            Linear, Embedding
====================== ================================================= ==========================
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt._environment import quiet_torchao_import
from coreai_opt.export.records import Affine

__all__ = ["quantized_tensor"]

_STABLE, _OPAQUE = "torchao.quantization", "torchao.prototype.quantization.int4"
_OPAQUE_GROUPS, _OPAQUE_ROWS = (32, 64, 128), 16
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LAYERS = {
    "integers": (nn.Linear, nn.Embedding, nn.Conv2d),
    "float8": (nn.Linear, nn.Embedding),
}


def quantized_tensor(record: Affine, name: str, layers: Sequence[type[nn.Module]]) -> Tensor:
    """The tensor that holds a weight as it is quantized.

    Args:
        record: the quantized weight.
        name: its qualified name, for messages.
        layers: classes of the layers that read it.

    Raises:
        ValueError: torchao has no tensor for it.
        ImportError: the installed torchao lacks the tensor.
    """
    if record.minval is not None:
        raise ValueError(
            f"{name!r} has the formulation 'minval'; torchao's tensors have zero points: use 'zp'"
        )
    kind = "float8" if record.dtype in _FLOAT8 else "integers"
    if record.dtype.is_floating_point and kind != "float8":
        raise ValueError(
            f"{name!r} is quantized to {record.dtype}; of torchao's tensors, those for inference on any "
            f"device hold integers and float8"
        )
    for layer in layers:
        if not issubclass(layer, _LAYERS[kind]):
            raise ValueError(
                f"{name!r} belongs to a {layer.__name__}; torchao's tensors of {kind} serve "
                f"{', '.join(each.__name__ for each in _LAYERS[kind])}"
            )
    if kind == "float8":
        return _float8(record)
    return _integers(record, all(issubclass(layer, nn.Linear) for layer in layers))


def _block(record: Affine) -> list[int]:
    return [size // count for size, count in zip(record.values.shape, record.scale.shape, strict=True)]


def _float8(record: Affine) -> Tensor:
    scale = record.scale
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.float()
    made: Tensor = _class(_STABLE, "Float8Tensor")(
        record.values, scale, block_size=_block(record), dtype=record.output_dtype
    )
    return made


def _integers(record: Affine, is_linear: bool) -> Tensor:
    label = str(record.dtype).removeprefix("torch.")
    bits = int(label.rpartition("int")[2])
    # Integers are signed there: both the values and the zero point of unsigned ones move down.
    shift = 1 << (bits - 1) if label.startswith("uint") else 0
    assert record.zero_point is not None
    values, zero_point = (
        (each.to(torch.int16) - shift).to(torch.int8) for each in (record.values, record.zero_point)
    )
    symmetric, block = not zero_point.any(), _block(record)
    made: Tensor
    if is_linear and bits == 8 and symmetric and (block[0] == 1 or record.scale.numel() == 1):
        made = _class(_STABLE, "Int8Tensor")(
            values, record.scale, block, record.output_dtype, zero_point=zero_point
        )
    elif is_linear and bits == 4 and _is_opaque(record, block, symmetric):
        made = _opaque(record, values, zero_point, block)
    else:
        dtype = getattr(torch, f"int{bits}")
        made = _class(_STABLE, "IntxUnpackedToInt8Tensor")(
            values, record.scale, zero_point, dtype, tuple(block), record.output_dtype, None
        )
    return made


def _is_opaque(record: Affine, block: list[int], symmetric: bool) -> bool:
    """Whether the kernel for packed 4 bits takes the weight, and gives the same values.

    It adds products of scales and zero points, which 16 bits round.
    """
    exact = symmetric or record.output_dtype == torch.float32
    return (
        record.values.device.type == "cpu"
        and block[0] == 1
        and block[1] in _OPAQUE_GROUPS
        and record.values.shape[0] % _OPAQUE_ROWS == 0
        and exact
    )


def _opaque(record: Affine, values: Tensor, zero_point: Tensor, block: list[int]) -> Tensor:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32) + 8, 1)
    offset = -zero_point.to(record.scale.dtype) * record.scale
    parameters = torch.stack((record.scale, offset), -1).transpose(0, 1).contiguous()
    made: Tensor = _class(_OPAQUE, "Int4OpaqueTensor")(packed, parameters, block, record.values.shape)
    return made


def _class(module: str, name: str) -> Any:
    try:
        with quiet_torchao_import():
            return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"tensor_subclass needs {module}.{name} of torchao 0.18 or later ({error})"
        ) from error
