"""Pruned models for Core AI and Core ML."""

import torch
from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.export import coreai, coreml
from coreai_opt.export.parametrized import Slot, replace_simulator, slots_of
from coreai_opt.export.records import Sparse
from coreai_opt.export.torch import fold
from coreai_opt.pruning.spec.prune import PruneImplBase

__all__ = ["finalize_pruned", "sparse_of"]


def finalize_pruned(model: nn.Module, backend: ExportBackend) -> None:
    """Replace the masks of a pruned model by what the backend reads, in place.

    If anything fails, the model is as it was.

    Args:
        model: the prepared model.
        backend: Core AI or Core ML.

    Raises:
        As :meth:`.MagnitudePruner.finalize`.
    """
    slots = list(slots_of(model, PruneImplBase))
    if backend is ExportBackend.CoreAI:
        _to_core_ai(slots)
        return
    described = [
        (slot.module, slot.attribute, coreml.metadata_of(sparse_of(slot), slot.name)) for slot in slots
    ]
    fold(model, PruneImplBase)
    for module, attribute, each in described:
        coreml.add_metadata(module, attribute, each)
    coreml.mark(model)


def _to_core_ai(slots: list[Slot]) -> None:
    coreai.require_operators()
    constants: dict[PruneImplBase, nn.Module] = {}
    for slot in slots:
        if slot.simulator not in constants:
            constants[slot.simulator] = coreai.weight_module(sparse_of(slot), slot.name)
    for slot in slots:
        replace_simulator(slot, constants[slot.simulator])


@torch.no_grad()
def sparse_of(slot: Slot) -> Sparse:
    """The weight of a slot, and which elements of it stay."""
    weight, simulator = slot.value(), slot.simulator
    mask = simulator.mask_for(weight) if simulator.is_stale else simulator.mask
    return Sparse(weight, mask.bool())
