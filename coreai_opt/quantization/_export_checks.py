"""What a quantized model must not have for Core AI and Core ML: told before anything is changed."""

from collections.abc import Iterable

import torch

from coreai_opt.common import CoreMLExportError, ExportBackend
from coreai_opt.quantization._export_records import is_weight
from coreai_opt.quantization._export_utils import has_activation_export_handler
from coreai_opt.quantization.spec import _numbers
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.granularity import (
    PerBlockGranularity,
    PerChannelGranularity,
    PerTensorGranularity,
)
from coreai_opt.quantization.spec.qformulation import QuantizationFormulation

__all__ = ["Named", "check_exportable", "check_observed"]

# A simulator, its qualified name, and the shape of its weight; None for an activation.
Named = tuple[str, FakeQuantizeImplBase, torch.Size | None]

_INTEGERS = ("int2", "int4", "int8", "uint2", "uint4", "uint8")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT4_BLOCK = 32


def check_exportable(simulators: Iterable[Named], backend: ExportBackend) -> None:
    """Raise unless the backend can express all of the simulators.

    Raises:
        NotImplementedError: parameters depend on the input, or there is no such dtype.
        ValueError: a dtype with this granularity or for this kind of tensor.
        CoreMLExportError: the same, for Core ML.
        RuntimeError: a simulator has observed nothing.
    """
    named = list(simulators)
    for name, simulator, _ in named:
        _check_known(name, simulator, backend)
    check = _check_core_ai if backend is ExportBackend.CoreAI else _check_core_ml
    for name, simulator, shape in named:
        handled = backend is ExportBackend.CoreAI and has_activation_export_handler(simulator)
        if shape is None and handled:
            continue
        check(name, simulator, shape)
        check_observed([(name, simulator)])


def check_observed(simulators: Iterable[tuple[str, FakeQuantizeImplBase]]) -> None:
    """Raise unless all of the simulators have parameters.

    Args:
        simulators: each with its qualified name.

    Raises:
        NotImplementedError: one keeps none, as they depend on the input.
        RuntimeError: one has observed nothing.
    """
    for name, simulator in simulators:
        if simulator.is_stateless:
            raise NotImplementedError(
                f"finalize: {name!r} is quantized dynamically, with parameters of each input: use another "
                f"qparam_calculator_cls"
            )
        scale = getattr(simulator.qparams_calculator, "scale", None)
        if scale is None or scale.numel() == 0:
            raise RuntimeError(
                f"finalize: {name!r} has no quantization parameters, as nothing was observed. Run a forward "
                f"in calibration_mode() or training_mode(), or load parameters, first"
            )


def _check_known(name: str, simulator: FakeQuantizeImplBase, backend: ExportBackend) -> None:
    dtype = simulator.dtype
    handled = (
        backend is ExportBackend.CoreAI
        and not is_weight(simulator)
        and has_activation_export_handler(simulator)
    )
    if simulator.is_stateless and not handled:
        raise NotImplementedError(
            f"finalize: {name!r} is quantized dynamically, with parameters of each input, which "
            f"{backend.name} has not. Use ExportBackend.Torch, or another qparam_calculator_cls"
        )
    is_float = _numbers.is_float_format(dtype)
    if not is_float and str(dtype).removeprefix("torch.") not in _INTEGERS:
        raise NotImplementedError(
            f"finalize: {name!r} has the dtype {dtype}, which {backend.name} has not. It has integers of 2, "
            f"4 and 8 bits, and floating point of 4 and 8; any dtype can be finalized for ExportBackend.Torch"
        )
    scale_dtype = getattr(simulator.qparams_calculator, "scale_dtype", None)
    if scale_dtype is None:
        return
    if scale_dtype != torch.float8_e8m0fnu or (not is_float and not handled):
        raise NotImplementedError(
            f"finalize: {name!r} has the dtype {dtype} with scales of {scale_dtype}, which {backend.name} "
            f"has not. Use ExportBackend.Torch"
        )


def _check_core_ai(name: str, simulator: FakeQuantizeImplBase, shape: torch.Size | None) -> None:
    dtype, granularity = simulator.dtype, simulator.granularity
    if shape is None:
        if dtype not in (torch.int8, torch.uint8, *_FLOAT8):
            raise ValueError(
                f"finalize: the activation {name!r} has the dtype {dtype}. Core AI quantizes activations to "
                f"int8, uint8, float8_e4m3fn and float8_e5m2"
            )
        if isinstance(granularity, PerBlockGranularity):
            raise ValueError(
                f"finalize: the activation {name!r} is quantized in blocks. Core AI quantizes activations "
                f"per tensor or per channel; another package may register a handler for "
                f"{type(granularity).__name__}"
            )
        return
    if dtype == _numbers.FLOAT4:
        wanted = (*[1] * (len(shape) - 1), _FLOAT4_BLOCK)
        block = simulator.get_block_size(shape)
        if not isinstance(granularity, PerBlockGranularity) or block != wanted:
            raise ValueError(
                f"finalize: {name!r} has the dtype {dtype} in blocks of {block}. Core AI has it in blocks of "
                f"{_FLOAT4_BLOCK} along the last axis: PerBlockGranularity(block_size={wanted})"
            )


def _check_core_ml(name: str, simulator: FakeQuantizeImplBase, shape: torch.Size | None) -> None:
    dtype, granularity = simulator.dtype, simulator.granularity
    kind = "weight" if shape is not None else "activation"
    allowed = ("int4", "uint4", "int8", "uint8") if shape is not None else ("int8", "uint8")
    if str(dtype).removeprefix("torch.") not in allowed:
        raise CoreMLExportError(
            f"CoreML export does not support the dtype {dtype}, as the {kind} {name!r} has: {kind}s are "
            f"{', '.join(allowed)}"
        )
    if shape is None and not isinstance(granularity, PerTensorGranularity):
        raise CoreMLExportError(
            f"CoreML export does not support {type(granularity).__name__} of activations, as {name!r} has: "
            f"use PerTensorGranularity"
        )
    known = (PerTensorGranularity, PerChannelGranularity, PerBlockGranularity)
    if not isinstance(granularity, known):
        raise CoreMLExportError(
            f"CoreML export does not support {type(granularity).__name__}, which the {kind} {name!r} has"
        )
    if simulator.qformulation == QuantizationFormulation.MINVAL:
        raise ValueError(
            f"CoreML export does not support qformulation 'minval', which the {kind} {name!r} has: use 'zp'"
        )
