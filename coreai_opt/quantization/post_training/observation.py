"""Observation of activations, with the weights' parameters as they are."""

from collections.abc import Sequence

from torch import nn
from tqdm.auto import tqdm

from coreai_opt._call_inputs import Arguments
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.preparation import set_flags, simulators_of
from coreai_opt.quantization.post_training._layers import forget

__all__ = ["observe_activations"]


def observe_activations(model: nn.Module, batches: Sequence[Arguments], *, anew: bool) -> None:
    """Let the simulators of activations observe the batches; weights are simulated meanwhile.

    Args:
        model: prepared.
        batches: arguments of its forwards.
        anew: forget what they observed before, of a model with other activations.
    """
    found = [
        each
        for each in simulators_of(model)
        if each.quantization_target is CompressionTargetTensor.ACTIVATION and not each.is_stateless
    ]
    if not found:
        return
    if anew:
        for each in found:
            forget(each.qparams_calculator)
    try:
        set_flags(found, observe=True, simulate=False)
        for batch in tqdm(batches, desc="Calibrating"):
            model(*batch.args, **batch.kwargs)
    finally:
        set_flags(found, observe=False, simulate=True)
