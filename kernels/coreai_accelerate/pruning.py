"""Apple's prune simulator, with masks of the engine."""

from torch import Tensor

import coreai_kernels
from coreai_accelerate.state import STATE, Replacement
from coreai_opt.pruning.spec import PruneImplBase

__all__ = ["FusedMagnitudePrune", "replacements"]

_Apple = PruneImplBase.REGISTRY["default"]


class FusedMagnitudePrune(_Apple):  # type: ignore[misc, valid-type]
    """Apple's magnitude pruning, with the masks of the engine. Of equal magnitudes the first stay."""

    @staticmethod
    def _compute_unstructured_mask(weight: Tensor, sparsity: float) -> Tensor:
        if not STATE.is_active or weight.numel() == 0:
            return _Apple._compute_unstructured_mask(weight, sparsity)  # type: ignore[no-any-return]
        return coreai_kernels.topk_mask(weight, _kept(weight.numel(), sparsity))

    @staticmethod
    def _compute_channel_mask(weight: Tensor, sparsity: float, axis: int) -> Tensor:
        if not STATE.is_active or weight.numel() == 0:
            return _Apple._compute_channel_mask(weight, sparsity, axis)  # type: ignore[no-any-return]
        return coreai_kernels.channel_mask(weight, _kept(weight.shape[axis], sparsity), axis, expanded=True)


def _kept(count: int, sparsity: float) -> int:
    """How many stay: the number that is pruned is rounded down."""
    return count - int(count * sparsity)


def replacements() -> list[Replacement]:
    """The prune simulator that specifications get by default."""
    registry = PruneImplBase.REGISTRY
    return [Replacement("prune simulator", registry, "default", FusedMagnitudePrune, old_key="apple")]
