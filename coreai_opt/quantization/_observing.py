"""The forward in which simulators see example inputs: whose error it is, and what cannot be simulated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.axes import has_open_axis
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["MASKED", "first_observations", "why_disabled"]

MASKED = "left as they are, as they hold masks (values at an end of the dtype, or not finite): %s"


@contextmanager
def first_observations(model: nn.Module) -> Iterator[set[FakeQuantizeImplBase]]:
    """While it is active, errors of simulators name their tensors.

    Yields:
        The simulators of activations that have seen a value at an end of its dtype, or none that is finite,
        as attention masks have them: a range with it leaves no precision for others, and no meaning to it.
    """
    names = {
        module: module.tensor_fqn or name
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeImplBase)
    }
    running: list[FakeQuantizeImplBase] = []
    found: set[FakeQuantizeImplBase] = set()

    def before(simulator: Any, args: tuple[Any, ...]) -> None:
        running.append(simulator)
        is_activation = simulator.quantization_target is CompressionTargetTensor.ACTIVATION
        if is_activation and simulator not in found and _is_masked(args[0]):
            found.add(simulator)

    def after(*_: Any) -> None:
        running.pop()

    handles = []
    for simulator in names:
        handles.append(simulator.register_forward_pre_hook(before))
        handles.append(simulator.register_forward_hook(after))
    try:
        yield found
    except ValueError as error:
        if not running:
            raise
        raise ValueError(
            f"{names[running[-1]]!r} cannot be quantized with {running[-1].granularity!r}: {error}. Give it "
            f"another specification, or none: module_name_configs with the name of its module, and None"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def why_disabled(simulator: FakeQuantizeImplBase) -> str:
    """Why a simulator that has seen its tensor does not simulate it."""
    if has_open_axis(simulator.granularity):
        return "with one axis, where the granularity names none"
    return f"that blocks do not fit ({simulator.granularity!r})"


def _is_masked(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
        return False
    # Half of it: transformers adds scores to the smallest number.
    return bool((tensor.detach().abs().amax() < torch.finfo(tensor.dtype).max / 2).logical_not())
