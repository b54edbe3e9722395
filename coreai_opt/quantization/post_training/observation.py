"""Observation of activations, with the weights' parameters as they are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from coreai_opt._call_inputs import Arguments
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.preparation import set_flags, simulators_of
from coreai_opt.quantization.post_training._layers import forget
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["finite_ranges", "observe_activations"]


def _observers(model: nn.Module) -> list[FakeQuantizeImplBase]:
    return [
        each
        for each in simulators_of(model)
        if each.quantization_target is CompressionTargetTensor.ACTIVATION and not each.is_stateless
    ]


@contextmanager
def finite_ranges(model: nn.Module) -> Iterator[None]:
    """A context in which activations may be observed. If any raises, ranges are as before.

    Raises:
        ValueError: an activation has a scale that is not finite at the end, and had a finite one before: NaN
            and infinity stay in a range, and make outputs NaN ever after.
    """
    found = [each for each in _observers(model) if _is_finite(each)]
    before = [
        (module, name, buffer.clone())
        for each in found
        for module in each.qparams_calculator.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
        infinite = [each.tensor_fqn for each in found if not _is_finite(each)]
        if infinite:
            raise ValueError(
                f"inputs: the data give {', '.join(map(repr, infinite))} NaN or infinite values, which would "
                f"stay in the range. Calibrate on data that the model computes finite values on"
            )
    except BaseException:
        for module, name, buffer in before:
            setattr(module, name, buffer)
        raise


def _is_finite(simulator: FakeQuantizeImplBase) -> bool:
    scale = getattr(simulator.qparams_calculator, "scale", None)
    return scale is None or bool(torch.isfinite(scale.float()).all())


def observe_activations(model: nn.Module, batches: Sequence[Arguments], *, anew: bool) -> None:
    """Let the simulators of activations observe the batches; weights are simulated meanwhile.

    Args:
        model: prepared.
        batches: arguments of its forwards.
        anew: forget what they observed before, of a model with other activations.

    Raises:
        ValueError: as of :func:`finite_ranges`.
    """
    found = _observers(model)
    if not found:
        return
    with finite_ranges(model):
        if anew:
            for each in found:
                forget(each.qparams_calculator)
        try:
            set_flags(found, observe=True, simulate=False)
            for batch in tqdm(batches, desc="Calibrating"):
                model(*batch.args, **batch.kwargs)
        finally:
            set_flags(found, observe=False, simulate=True)
