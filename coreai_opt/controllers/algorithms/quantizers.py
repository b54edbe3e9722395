"""Simulators in a model, on the inputs of layers and the outputs of the model, as hooks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.controllers.core.distributed import is_distributed, widest_over_ranks
from coreai_opt.controllers.core.hooks import remove_hooks
from coreai_opt.controllers.core.layers import INPUT, OUTPUT
from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec
from coreai_opt.quantization.spec._state import UNSHAPED, reshape_buffer
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = [
    "OUTPUT",
    "floating",
    "inputs_of",
    "make_simulator",
    "observe_over_ranks",
    "put_on_input",
    "put_on_outputs",
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


def _simulator_of(module: nn.Module) -> Any:
    simulator: Any = module._modules[INPUT]
    if getattr(simulator, _SHARED, False) and is_distributed():
        return partial(_simulate_over_ranks, simulator)
    return simulator


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    simulator = _simulator_of(layer)
    if args:
        return (simulator(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": simulator(kwargs["input"])}


def _quantize_attention_inputs(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Attention looks whether query, key and value are one tensor: they stay one.
    simulator = _simulator_of(layer)
    seen: list[tuple[Tensor, Tensor]] = []

    def quantized(value: Tensor) -> Tensor:
        for given, result in seen:
            if given is value:
                return result
        seen.append((value, simulator(value)))
        return seen[-1][1]

    new = tuple(quantized(value) if index < 3 else value for index, value in enumerate(args))
    named = {
        name: quantized(value) if name in ("query", "key", "value") else value
        for name, value in kwargs.items()
    }
    return new, named


def inputs_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a layer's simulator of inputs sees, each once."""
    if not isinstance(layer, nn.MultiheadAttention):
        return [args[0] if args else kwargs["input"]]
    given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
    return [value for index, value in enumerate(given) if all(value is not e for e in given[:index])]


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
    """Quantize the layer's input; of attention, query, key and value."""
    layer.add_module(INPUT, simulator)
    attention = isinstance(layer, nn.MultiheadAttention)
    hook = _quantize_attention_inputs if attention else _quantize_input
    layer.register_forward_pre_hook(hook, with_kwargs=True)


def take_off_input(layer: nn.Module) -> None:
    """Undo :func:`put_on_input`."""
    remove_hooks(layer, lambda hook: hook in (_quantize_input, _quantize_attention_inputs))
    del layer._modules[INPUT]


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, in their order."""
    return [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]


def _quantize_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    simulators: Any = module._modules[OUTPUT]
    leaves, structure = tree_flatten(output)
    waiting = iter(simulators)
    quantized = [
        next(waiting)(each) if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in leaves
    ]
    return tree_unflatten(quantized, structure)


def put_on_outputs(model: nn.Module, simulators: list[nn.Module]) -> None:
    """Quantize the model's floating-point outputs, in their order."""
    model.add_module(OUTPUT, nn.ModuleList(simulators))
    model.register_forward_hook(_quantize_outputs, prepend=True)


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
