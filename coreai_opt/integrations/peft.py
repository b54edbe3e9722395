"""Adapters of PEFT over prepared models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["merge_and_unload"]


def merge_and_unload(model: PeftModel, **kwargs: Any) -> nn.Module:
    """Add the adapters to the weights behind simulators, and return the model without adapters.

    PEFT's own method adds them to what the simulators return, which the next forward computes anew, so that
    they are lost. Quantizers observe the merged weights; masks stay, and palettes follow their weights.

    Args:
        model: a prepared model in adapters.
        kwargs: further arguments of ``PeftModel.merge_and_unload``.

    Raises:
        TypeError: the model has no adapters of PEFT.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel; got {type(model).__name__}")
    adapted = [
        _base_of(layer)
        for layer in model.modules()
        if hasattr(layer, "get_base_layer") and layer is not model
    ]
    with _originals_in_place(model):
        merged: nn.Module = model.merge_and_unload(**kwargs)
    for layer in adapted:
        _observe_weights(layer)
    return merged


def _base_of(layer: Any) -> nn.Module:
    return layer.get_base_layer()  # type: ignore[no-any-return]


@contextmanager
def _originals_in_place(model: nn.Module) -> Iterator[None]:
    """While it is active, compressed parameters are what is behind their simulators."""
    changed: list[tuple[nn.Module, type[nn.Module], list[str]]] = []
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        lists: Any = module.parametrizations
        names = [
            name
            for name, chain in lists.items()
            if all(isinstance(each, CompressionSimulatorBase) for each in chain)
            and isinstance(chain.original, nn.Parameter)
        ]
        if len(names) == len(lists):
            changed.append((module, type(module), names))
    try:
        for module, _, names in changed:
            module.__class__ = parametrize.type_before_parametrizations(module)
            for name in names:
                module._parameters[name] = module.parametrizations[name].original  # type: ignore[index, union-attr]
        yield
    finally:
        for module, cls, names in changed:
            for name in names:
                module._parameters.pop(name, None)
            module.__class__ = cls


@torch.no_grad()
def _observe_weights(layer: nn.Module) -> None:
    if not parametrize.is_parametrized(layer):
        return
    lists: Any = layer.parametrizations
    for name, chain in lists.items():
        simulators = [each for each in chain if isinstance(each, FakeQuantizeImplBase)]
        before = [each._current_flags().observe for each in simulators]
        for each in simulators:
            each.enable_observer()
        getattr(layer, name)
        for each, observed in zip(simulators, before, strict=True):
            each.enable_observer(observed)
