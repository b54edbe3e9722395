"""Pruned models for Core AI and Core ML."""

import torch
from torch import nn

from coreai_opt.common import ExportBackend
from coreai_opt.export import coreai, coreml
from coreai_opt.export.parametrized import Place, places_of, replace_simulator
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
    places = list(places_of(model, PruneImplBase))
    if backend is ExportBackend.CoreAI:
        _to_core_ai(places)
        return
    described = [
        (place.module, place.attribute, coreml.metadata_of(sparse_of(place), place.name)) for place in places
    ]
    fold(model, PruneImplBase)
    for module, attribute, each in described:
        coreml.add_metadata(module, attribute, each)
    coreml.mark(model)


def _to_core_ai(places: list[Place]) -> None:
    coreai.require_operators()
    constants: dict[PruneImplBase, nn.Module] = {}
    for place in places:
        if place.simulator not in constants:
            constants[place.simulator] = coreai.weight_module(sparse_of(place), place.name)
    for place in places:
        replace_simulator(place, constants[place.simulator])


@torch.no_grad()
def sparse_of(place: Place) -> Sparse:
    """The weight at a place, and which elements of it stay."""
    weight, simulator = place.value(), place.simulator
    mask = simulator.mask_for(weight) if simulator.is_stale else simulator.mask
    return Sparse(weight, mask.bool())
