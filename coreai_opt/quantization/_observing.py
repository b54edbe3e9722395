"""The forward in which simulators see example inputs: whose error it is, and what cannot be simulated."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.axes import has_open_axis
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["first_observations", "tell_what_is_left", "why_disabled"]

logger = logging.getLogger(__name__)

_MASKED = "left as they are, as they hold masks (values at an end of the dtype, or infinite): %s"
_NAN = (
    "not quantized, as they are NaN in the forward on the example inputs: %s. If that is not meant, look at "
    "the inputs and the weights"
)


@contextmanager
def first_observations(model: nn.Module) -> Iterator[dict[FakeQuantizeImplBase, bool]]:
    """While it is active, errors of simulators name their tensors.

    Yields:
        The simulators of activations that have seen a value at an end of its dtype, or one that is not
        finite, as attention masks have them: a range with it leaves no precision for others, and no meaning
        to it. And whether there was a NaN, which is no mask's.
    """
    names = {
        module: module.tensor_fqn or name
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantizeImplBase)
    }
    running: list[FakeQuantizeImplBase] = []
    found: dict[FakeQuantizeImplBase, bool] = {}

    def before(simulator: Any, args: tuple[Any, ...]) -> None:
        running.append(simulator)
        is_activation = simulator.quantization_target is CompressionTargetTensor.ACTIVATION
        if is_activation and simulator not in found and _is_masked(args[0]):
            found[simulator] = bool(args[0].isnan().any())

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


def tell_what_is_left(found: Iterable[tuple[str, bool]]) -> None:
    """Log the names of the activations that :func:`first_observations` yields."""
    masks: list[str] = []
    nan: list[str] = []
    for name, has_nan in found:
        (nan if has_nan else masks).append(name)
    if masks:
        logger.info(_MASKED, ", ".join(masks))
    if nan:
        logger.warning(_NAN, ", ".join(nan))


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
