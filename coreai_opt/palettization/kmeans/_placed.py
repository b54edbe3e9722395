"""Simulators where they are in a model."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_opt._sharding.layout import whole
from coreai_opt.palettization.kmeans.kmeans_fake_palettize import _KMeansFakePalettize

__all__ = ["Placed", "keep_up_to_date", "placed_simulators"]


class Placed(NamedTuple):
    """A simulator, the parametrizations that it is among, and the name of the tensor that enters them."""

    simulator: _KMeansFakePalettize
    chain: Any
    original_name: str

    def weight(self) -> Tensor:
        """The tensor that enters the simulator, without gradients."""
        with torch.no_grad():
            return _input_of(self.simulator, self.chain)


def placed_simulators(model: nn.Module) -> Iterator[Placed]:
    """The simulators in ``model``, each once, at its first place."""
    seen = set()
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
            for simulator in chain:  # type: ignore[union-attr]
                if isinstance(simulator, _KMeansFakePalettize) and simulator not in seen:
                    seen.add(simulator)
                    path = (name, "parametrizations", attribute, "original")
                    yield Placed(simulator, chain, ".".join(filter(None, path)))


def keep_up_to_date(chain: Any) -> None:
    """Have the simulators among some parametrizations look at their weight around saving and loading."""
    chain.register_state_dict_pre_hook(_refresh_before_saving)
    chain.register_load_state_dict_post_hook(_detect_after_loading)


def _refresh_before_saving(chain: Any, prefix: str, keep_vars: bool) -> None:
    """Bring the indices up to date with the weight before they go into a ``state_dict``."""
    for simulator in chain:
        if isinstance(simulator, _KMeansFakePalettize):
            with torch.no_grad():
                simulator.refresh_indices(_input_of(simulator, chain))


def _detect_after_loading(chain: Any, incompatible_keys: Any) -> None:
    """Find the zeros of the loaded weight here, so that no compiled forward has to wait for the device."""
    for simulator in () if chain.original.is_meta else chain:
        if isinstance(simulator, _KMeansFakePalettize) and simulator.sparsity_detection_threshold is not None:
            with torch.no_grad():
                simulator.detect_sparsity(_input_of(simulator, chain))


def _input_of(simulator: nn.Module, chain: Any) -> Tensor:
    weight = whole(chain.original)
    for parametrization in chain:
        if parametrization is simulator:
            break
        weight = parametrization(weight)
    return weight
