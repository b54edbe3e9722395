"""Simulators in a model: on weights as parametrizations, on the inputs of layers as hooks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.controllers.core.distributed import is_distributed, widest_over_ranks
from coreai_opt.controllers.core.hooks import remove_hooks
from coreai_opt.controllers.core.layers import INPUT
from coreai_opt.controllers.core.masks import install
from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec
from coreai_opt.quantization.spec._state import UNSHAPED, reshape_buffer
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = [
    "make_simulator",
    "observe_over_ranks",
    "put_on_input",
    "put_on_weight",
    "set_range",
    "take_off_input",
]

_SHARED = "observes_over_ranks"


def make_simulator(
    spec: QuantizationSpec, target: CompressionTargetTensor, name: str, device: torch.device
) -> FakeQuantizeImplBase:
    """A simulator on ``device``, which messages call ``name``."""
    simulator = QuantizationComponentFactory.construct(spec, target)
    assert simulator is not None  # a specification was given
    simulator.tensor_fqn = name
    return simulator.to(device)


def put_on_weight(layer: nn.Module, simulator: nn.Module) -> None:
    """Quantize the layer's weight, after what other algorithms do to it."""
    install(layer, simulator)


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    simulator: Any = layer._modules[INPUT]
    if getattr(simulator, _SHARED, False) and is_distributed():
        simulator = partial(_simulate_over_ranks, simulator)
    if args:
        return (simulator(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": simulator(kwargs["input"])}


def observe_over_ranks(simulator: Any) -> None:
    """Let a simulator follow the inputs of all ranks; in evaluation, where ranks may differ, none."""
    setattr(simulator, _SHARED, True)


def _simulate_over_ranks(simulator: Any, tensor: Tensor) -> Tensor:
    if simulator.training:
        with torch.no_grad():
            ends = torch.stack(widest_over_ranks(*tensor.detach().aminmax()))
            simulator.qparams_calculator(ends.reshape(-1, *[1] * (tensor.dim() - 1)))
    simulator.enable_observer(False)
    try:
        return simulator(tensor)  # type: ignore[no-any-return]
    finally:
        simulator.enable_observer(True)


def put_on_input(layer: nn.Module, simulator: nn.Module) -> None:
    """Quantize the layer's input."""
    layer.add_module(INPUT, simulator)
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def take_off_input(layer: nn.Module) -> None:
    """Undo :func:`put_on_input`."""
    remove_hooks(layer, lambda hook: hook is _quantize_input)
    del layer._modules[INPUT]


@torch.no_grad()
def set_range(
    simulator: FakeQuantizeImplBase, low: Tensor, high: Tensor, shape: torch.Size, axis: int | None
) -> None:
    """Give a simulator a range and keep it: it observes no more.

    It is shown a tensor that spans the range.

    Args:
        simulator: a stateful one.
        low: lower ends, one a channel or one in all.
        high: upper ends, as many.
        shape: of the tensors that will be simulated.
        axis: of the channels; None for one range.
    """
    ends = torch.stack([low.reshape(-1), high.reshape(-1)], dim=1).float()
    if axis is None:
        ends = ends.reshape(-1)
    else:
        spread = [1] * len(shape)
        spread[axis] = shape[axis]
        ends = torch.stack([ends[:, 0].reshape(spread), ends[:, 1].reshape(spread)], dim=-1)
        # Both ends side by side in an axis that is no channel.
        other = next(index for index in range(len(shape)) if index != axis)
        ends = torch.cat([ends[..., 0], ends[..., 1]], dim=other)
    calculator = simulator.qparams_calculator
    for name in ("running_min", "running_max"):
        if hasattr(calculator, name):  # forget what was averaged before
            reshape_buffer(calculator, name, UNSHAPED, getattr(calculator, name).dtype)
    simulator.enable_observer(True)
    calculator(ends)
    simulator.enable_observer(False)
