"""Quantized models, prepared in eager mode, for Core AI and Core ML."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.export import coreai, coreml, mapped
from coreai_opt.export.parametrized import Slot, replace_simulator, slots_of
from coreai_opt.export.torch import fold
from coreai_opt.quantization._export_checks import Named, check_exportable
from coreai_opt.quantization._export_records import affine_weight, is_weight, quantized_activation
from coreai_opt.quantization._export_utils import eager_activation_export_handler
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["activations_of", "finalize_eager", "observed_dtype"]


def finalize_eager(model: nn.Module, backend: ExportBackend, mmap_dir: str | Path | None = None) -> None:
    """Replace the simulators of a model by what the backend reads, in place.

    If anything fails, the model is as it was.

    Args:
        model: prepared in eager mode.
        backend: Core AI or Core ML.
        mmap_dir: see :meth:`.Quantizer.finalize`.

    Raises:
        As :meth:`.Quantizer.finalize`.
    """
    if mmap_dir is not None:
        mapped.check(model, mmap_dir)
    weights = [slot for slot in slots_of(model, FakeQuantizeImplBase) if is_weight(slot.simulator)]
    activations = list(activations_of(model))
    check_exportable(_named(weights, activations), backend)
    if backend is ExportBackend.CoreAI:
        _to_core_ai(weights, activations, mmap_dir)
    else:
        _to_core_ml(model, weights, activations)


def _named(weights: list[Slot], activations: list[tuple[nn.Module, str, str]]) -> Iterator[Named]:
    for slot in weights:
        yield slot.name, slot.simulator, slot.value().shape
    for module, child, name in activations:
        yield name, getattr(module, child), None


def activations_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Each module with a simulator of an activation, the name under which it has it, and the whole name."""
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue  # palettes have simulators for their tables
        for child, simulator in module._modules.items():
            if isinstance(simulator, FakeQuantizeImplBase) and not is_weight(simulator):
                yield module, child, f"{name}.{child}".lstrip(".")


def _to_core_ai(
    weights: list[Slot],
    activations: list[tuple[nn.Module, str, str]],
    mmap_dir: str | Path | None,
) -> None:
    coreai.require_operators()
    constants: dict[FakeQuantizeImplBase, nn.Module] = {}
    with mapped.folder(mmap_dir) as folder:
        for slot in weights:
            if slot.simulator not in constants:
                constant = coreai.weight_module(
                    affine_weight(slot.simulator, slot.value(), slot.name), slot.name
                )
                constants[slot.simulator] = folder.moved(constant, slot.name)
        pairs: dict[FakeQuantizeImplBase, nn.Module] = {}
        for module, child, _ in activations:
            simulator: Any = getattr(module, child)
            if simulator not in pairs:
                pairs[simulator] = _core_ai_activation(simulator, module)
    for slot in weights:
        replace_simulator(slot, constants[slot.simulator])
    for module, child, _ in activations:
        simulator = getattr(module, child)
        setattr(module, child, pairs[simulator].train(module.training))


def _core_ai_activation(simulator: FakeQuantizeImplBase, owner: nn.Module) -> nn.Module:
    handler = eager_activation_export_handler(simulator)
    if handler is not None:
        return handler(simulator)
    return coreai.activation_module(quantized_activation(simulator, observed_dtype(simulator, owner)))


def observed_dtype(simulator: FakeQuantizeImplBase, owner: nn.Module) -> torch.dtype:
    """The dtype of the activation that was observed, as far as there is a trace of it."""
    observed = getattr(simulator.qparams_calculator, "running_min", None)
    if observed is not None and observed.numel():
        return observed.dtype  # type: ignore[no-any-return]
    floating = (each.dtype for each in owner.parameters() if each.is_floating_point())
    return next(floating, torch.float32)


def _to_core_ml(model: nn.Module, weights: list[Slot], activations: list[tuple[nn.Module, str, str]]) -> None:
    simulators = [slot.simulator for slot in weights]
    metadata = {
        simulator: coreml.metadata_of(affine_weight(simulator, slot.value()), slot.name)
        for simulator, slot in zip(simulators, weights, strict=True)
    }
    pairs: dict[FakeQuantizeImplBase, nn.Module] = {}
    for module, child, _ in activations:
        simulator: Any = getattr(module, child)
        record = quantized_activation(simulator, observed_dtype(simulator, module))
        pairs[simulator] = coreml.activation_module(record, simulator.calculate_qparams()[0].shape)
    fold(model, FakeQuantizeImplBase)
    for slot, simulator in zip(weights, simulators, strict=True):
        coreml.add_metadata(slot.module, slot.attribute, metadata[simulator])
    for module, child, _ in activations:
        setattr(module, child, pairs[getattr(module, child)].train(module.training))
    coreml.mark(model)
