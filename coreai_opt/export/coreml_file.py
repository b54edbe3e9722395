"""Core ML packages: ``.mlpackage`` folders."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coreai_opt.export.files import Job

__all__ = ["check", "run", "write"]

_OPTIONS = ("minimum_deployment_target", "compute_units")
_DEFAULT_TARGET = "iOS18"
_PREFIX = "_COREML_/"
_PRUNING = 1
# The converter takes smaller magnitudes for pruned ones: the distance of half-precision numbers at 1.
_SMALLEST = 2.0**-10


def check(job: Job) -> None:
    """Raise unless the model can be converted, as far as that is known before.

    Raises:
        ImportError: coremltools is not installed.
        ValueError: an option is unknown, arguments are no tensors, or the systems to run on cannot hold what
            the model is compressed with.
    """
    ct = _coremltools()
    unknown = sorted(set(job.options) - set(_OPTIONS))
    if unknown:
        raise ValueError(f"there are no options {unknown} for .mlpackage; there are {list(_OPTIONS)}")
    job.require_tensors()
    if job.dynamic_shapes is not None:
        raise ValueError("dynamic_shapes: .mlpackage has fixed shapes, those of example_inputs")
    _warn_of_small_values(job.model)
    target = _target(job, ct)
    for name, needed, what in _needs(job.model):
        if target < getattr(ct.target, needed):
            raise ValueError(
                f"minimum_deployment_target: {name!r} has {what}, which needs {needed} or later; got "
                f"{target.name}"
            )


def _warn_of_small_values(model: torch.nn.Module) -> None:
    for module_name, module in model.named_modules():
        for buffer_name, types in module._buffers.items():
            if buffer_name.startswith(_PREFIX) and buffer_name.endswith("/compression_type"):
                attribute = buffer_name.split("/")[1]
                assert types is not None
                weight = getattr(module, attribute)
                lost = int(((weight != 0) & (weight.abs() <= _SMALLEST)).sum())
                if lost and _PRUNING in types.tolist():
                    warnings.warn(
                        f"{module_name}.{attribute}: {lost} elements that pruning keeps have magnitudes up "
                        f"to 2**-10; coremltools takes them for pruned ones, and stores zeros",
                        UserWarning,
                        stacklevel=4,
                    )


def _coremltools() -> Any:
    try:
        return importlib.import_module("coremltools")
    except ImportError as error:
        raise ImportError(
            f"models for Core ML need the package coremltools ({error}): "
            f"pip install 'coreai-opt-fused[coreml]'"
        ) from error


def _target(job: Job, ct: Any) -> Any:
    given = job.options.get("minimum_deployment_target", _DEFAULT_TARGET)
    if isinstance(given, str):
        found = getattr(ct.target, given, None)
        if found is None:
            known = ", ".join(each.name for each in ct.target)
            raise ValueError(f"minimum_deployment_target must be one of {known}; got {given!r}")
        return found
    return given


def _needs(model: torch.nn.Module) -> list[tuple[str, str, str]]:
    """For each compressed tensor its name, the first system that can hold it, and why."""
    found = []
    for module_name, module in model.named_modules():
        if hasattr(module, "quantize") and hasattr(module, "dequantize"):
            found.append((module_name, "iOS17", "a quantized activation"))
        for buffer_name, types in module._buffers.items():
            if not buffer_name.startswith(_PREFIX) or not buffer_name.endswith("/compression_type"):
                continue
            attribute = buffer_name.split("/")[1]
            name = f"{module_name}.{attribute}".lstrip(".")
            found.append((name, "iOS16", "a compressed weight"))
            assert types is not None
            found += [(name, "iOS18", what) for what in _late_features(module, attribute, types)]
    return found


def _late_features(module: torch.nn.Module, attribute: str, types: Tensor) -> list[str]:
    def metadata(key: str) -> Tensor | None:
        return module._buffers.get(f"{_PREFIX}{attribute}/{key}")

    found = []
    if types.numel() > 1:
        found.append("joint compression")
    scale, bits, lut = metadata("quantization_scale"), metadata("quantization_n_bits"), metadata("lut")
    if scale is not None and sum(size > 1 for size in scale.shape) > 1:
        found.append("blocks")
    if bits is not None and int(bits) < 8:
        found.append(f"{int(bits)}-bit integers")
    if lut is not None and lut.shape[:-2].numel() > 1:
        found.append("a palette for each group")
    for key, what in (("vector_axis", "palettes of vectors"), ("palettization_scale", "a scale of channels")):
        if metadata(key) is not None:
            found.append(what)
    return found


def write(job: Job, path: Path) -> None:
    """Convert the model, finalized for Core ML, and write it."""
    ct = _coremltools()
    precision = ct.precision.FLOAT16 if job.half else ct.precision.FLOAT32
    units = job.options.get("compute_units")
    with torch.no_grad(), _without_fused_attention():
        traced = torch.jit.trace(job.model, job.args, check_trace=False)
    inputs = [
        ct.TensorType(name=name, shape=tensor.shape)
        for name, tensor in zip(job.input_names, job.inputs, strict=True)
    ]
    try:
        converted = ct.convert(
            traced,
            inputs=inputs,
            outputs=[ct.TensorType(name=name) for name in job.output_names],
            minimum_deployment_target=_target(job, ct),
            compute_precision=precision,
            skip_model_load=True,
            **({} if units is None else {"compute_units": units}),
        )
    except TypeError as error:
        if "0-dimensional" in str(error):
            error.add_note("coremltools 9.0 converts some operators with NumPy below 2.4 only")
        raise
    converted.save(str(path))


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Attention in operators that the converter knows."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(job: Job, path: Path) -> list[Tensor] | None:
    """What the written model computes for the example; None where Core ML does not run."""
    if sys.platform != "darwin":
        return None
    ct = _coremltools()
    inputs = {name: each.numpy() for name, each in zip(job.input_names, job.inputs, strict=True)}
    result = ct.models.MLModel(str(path)).predict(inputs)
    return [torch.from_numpy(result[name]) for name in job.output_names]
