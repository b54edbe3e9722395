"""The numbers of a compressed model: sizes, ranges, errors, clipping, palettes, masks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coreai_kernels.wide import widened
from coreai_opt._call_inputs import example_arguments
from coreai_opt._state_tensors import refuse_meta, side_effects_undone
from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.config.spec.storage import is_off
from coreai_opt.inspection._graph_storage import weight_values
from coreai_opt.inspection._simulators import describe, ends_of
from coreai_opt.inspection.bits_per_weight import StoredTensor, bits_per_weight, stored_tensors
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["figures", "scalars"]

_BINS = 48


def figures(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The numbers of a model as plain data, ready for JSON.

    Args:
        model: a float model, or one prepared in either mode or finalized; it is left as it was.
        example_inputs: positional arguments for one forward, or a mapping of keyword arguments, which shows
            how much of the activations is clipped; None to leave that out.

    Returns:
        ``"model"``: ``bits_per_weight``, ``total_bits``, ``total_weights``, ``bytes``. ``"tensors"``: a dict
        for each parameter and buffer, with its name, shape, dtype, elements, bits, minimum, maximum, share of
        zeros, histogram, and under ``"compression"`` what its simulators are and do. ``"activations"``: a
        dict for each simulator of an activation.

    Raises:
        NotImplementedError: see :func:`coreai_opt.inspection.bits_per_weight`.
        TypeError: ``model`` is no module; or ``example_inputs`` is neither a tuple nor a mapping.
        RuntimeError: the model is on the meta device.
    """
    total = bits_per_weight(model)
    refuse_meta(model)
    modules = dict(model.named_modules())
    tensors = [_tensor(model, modules[stored.module_name], stored) for stored in stored_tensors(model)]
    weights = {id(each) for stored in stored_tensors(model) for each in stored.simulators}
    activations = {
        name: module
        for name, module in modules.items()
        if isinstance(module, FakeQuantizeImplBase)
        and id(module) not in weights
        and _is_outermost(name, modules)
    }
    return {
        "model": {
            "bits_per_weight": total.bpw,
            "total_bits": total.total_bits,
            "total_weights": total.total_weights,
            "bytes": (total.total_bits + 7) // 8,
        },
        "tensors": tensors,
        "activations": _activations(model, activations, example_inputs),
    }


def scalars(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of :func:`figures` by names such as ``"block.fc.weight/bits_per_weight"``, for loggers.

    ``writer.add_scalar(name, value, step)`` for each item writes them to TensorBoard,
    ``wandb.log(scalars(figures(model)))`` to Weights & Biases.
    """
    result = {f"model/{name}": float(value) for name, value in found["model"].items()}
    for entry in found["tensors"]:
        _flatten(entry["name"], {k: v for k, v in entry.items() if k not in ("name", "histogram")}, result)
    for entry in found["activations"]:
        _flatten(entry["name"], {k: v for k, v in entry.items() if k != "name"}, result)
    return result


def _flatten(prefix: str, value: Any, result: dict[str, float]) -> None:
    if isinstance(value, dict):
        for name, each in value.items():
            _flatten(f"{prefix}/{name}", each, result)
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, dict):
                _flatten(f"{prefix}/{each['kind']}", each, result)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        result[prefix] = float(value)


def _is_outermost(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a simulator belongs to no other one, as that of a palette does."""
    parents = name.split(".")[:-1]
    above = (".".join(parents[:end]) for end in range(1, len(parents) + 1))
    return not any(isinstance(modules.get(each), CompressionSimulatorBase) for each in above)


def _tensor(model: nn.Module, module: nn.Module, stored: StoredTensor) -> dict[str, Any]:
    name = f"{stored.module_name}.{stored.name}".removeprefix(".")
    simulators = [each for each in stored.simulators if not is_off(each)]
    with torch.no_grad():
        original, value = _values(model, module, stored)
        entry = {
            "name": name,
            "module_type": type(module).__name__,
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "elements": stored.elements,
            "bits": stored.bits,
            "bits_per_weight": stored.bits / max(stored.elements, 1),
            **_distribution(value),
        }
        if simulators:
            entry["relative_error"] = _relative_error(value, original)
            entry["compression"] = [describe(each, original) for each in simulators]
        return entry


def _values(model: nn.Module, module: nn.Module, stored: StoredTensor) -> tuple[Tensor, Tensor]:
    """A tensor before and behind its simulators."""
    if stored.simulators and isinstance(model, torch.fx.GraphModule):
        return weight_values(model, f"{stored.module_name}.{stored.name}".removeprefix("."))
    value = getattr(module, stored.name).detach()
    if not stored.simulators:
        return value, value
    return module.parametrizations[stored.name].original.detach(), value  # type: ignore[union-attr, index]


def _distribution(value: Tensor) -> dict[str, Any]:
    numbers = value.float().flatten()
    finite = numbers[numbers.isfinite()]
    if not finite.numel():
        return {"minimum": None, "maximum": None, "zeros": None, "histogram": None}
    low, high = float(finite.min()), float(finite.max())
    counts = torch.histc(finite, _BINS, low, high) if high > low else torch.tensor([finite.numel()])
    return {
        "minimum": low,
        "maximum": high,
        "zeros": float((finite == 0).float().mean()),
        "histogram": [int(count) for count in counts],
    }


def _relative_error(found: Tensor, expected: Tensor) -> float:
    power = widened(expected).square().sum()
    return float((widened(found) - widened(expected)).square().sum() / power.clamp(min=1e-30))


def _activations(
    model: nn.Module,
    simulators: dict[str, FakeQuantizeImplBase],
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in simulators}
    if example_inputs is not None:
        arguments = example_arguments(model, example_inputs)
        with _watched(simulators, seen), side_effects_undone(model), torch.no_grad():
            model(*arguments.args, **arguments.kwargs)
    return [_activation(name, simulator, seen[name]) for name, simulator in simulators.items()]


@contextmanager
def _watched(simulators: dict[str, FakeQuantizeImplBase], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """Keep what simulators receive."""
    handles = []

    def watch(name: str, simulator: nn.Module) -> None:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name].append(args[0].detach())

        handles.append(simulator.register_forward_pre_hook(keep))

    try:
        for name, simulator in simulators.items():
            watch(name, simulator)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation(name: str, simulator: FakeQuantizeImplBase, seen: Sequence[Tensor]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name}
    with torch.no_grad():
        if seen:
            per_call = [describe(simulator, tensor) for tensor in seen]
            entry |= per_call[0]
            for share in ("clipped", "saturated"):
                if share in entry:
                    entry[share] = sum(each[share] for each in per_call) / len(per_call)
            entry["calls"] = len(seen)
        else:
            entry |= describe(simulator, None)
        ends = ends_of(simulator)
        if ends is not None:
            entry |= {"minimum": float(ends[0].min()), "maximum": float(ends[1].max())}
    return entry
