"""Apple's prune simulator, with masks of the engine."""

from typing import Any

import torch
from torch import Tensor

import coreai_kernels
from coreai_accelerate.state import STATE, PickledAs, Replacement, fall_back, has_kernels, is_traced
from coreai_opt.pruning.spec import ChannelStructured
from coreai_opt.pruning.spec.prune import _MagnitudePruneImpl

__all__ = ["FusedMagnitudePrune", "replacements"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What Apple's mask is made by, as it was when the plugin was imported.
_METHODS = {
    name: getattr(_MagnitudePruneImpl, name)
    for name in ("compute_mask", "_compute_unstructured_mask", "_compute_channel_mask")
}


class FusedMagnitudePrune(_MagnitudePruneImpl, PickledAs):
    """Apple's magnitude pruning, with the masks of the engine. Of equal magnitudes the first stay."""

    _pickled_as = _MagnitudePruneImpl

    def _get_name(self) -> str:
        return _MagnitudePruneImpl.__name__  # a printed model looks as it did

    @staticmethod
    def compute_mask(weight: Tensor, sparsity: float, pruning_scheme: Any) -> Tensor:
        """Ones for what stays, zeros for what is pruned."""
        # Else the mask is all ones or all zeros; a program that is compiled has no place for the count.
        is_plain = 0 < sparsity < 1 and weight.numel() > 0 and not torch.compiler.is_compiling()
        if not is_plain:
            return _MagnitudePruneImpl.compute_mask(weight, sparsity, pruning_scheme)  # type: ignore[no-any-return]
        reason = _refusal(weight, pruning_scheme)
        if reason is not None:
            fall_back(reason)
            return _MagnitudePruneImpl.compute_mask(weight, sparsity, pruning_scheme)  # type: ignore[no-any-return]
        weight = weight.detach()
        if isinstance(pruning_scheme, ChannelStructured):
            axis = pruning_scheme.axis
            return coreai_kernels.channel_mask(
                weight, _kept(weight.shape[axis], sparsity), axis, expanded=True
            )
        return coreai_kernels.topk_mask(weight, _kept(weight.numel(), sparsity))


def _refusal(weight: Tensor, scheme: Any) -> str | None:
    """Why Apple's method computes the mask; None if the engine does."""
    if not STATE.is_active:
        return "not active"
    if is_traced(weight):
        return "compiled or exported program"
    if weight.dtype not in _DTYPES:
        return str(weight.dtype).removeprefix("torch.")
    if not has_kernels(weight):
        return "no compiled library"
    if any(getattr(_MagnitudePruneImpl, name) is not method for name, method in _METHODS.items()):
        return "methods"
    if isinstance(scheme, ChannelStructured):
        if weight.dtype != torch.float32:  # of which Apple's norms are sums, which tie
            return "channels of " + str(weight.dtype).removeprefix("torch.")
        if weight.dim() == 1:
            return "channels of one axis"
        if not -weight.dim() <= scheme.axis < weight.dim():
            return "axis"
    return None


def _kept(count: int, sparsity: float) -> int:
    """How many stay: the number that is pruned is rounded down."""
    return count - int(count * sparsity)


def replacements() -> list[Replacement]:
    """The prune simulator that specifications get by default."""
    return [Replacement("prune simulator", _MagnitudePruneImpl, FusedMagnitudePrune)]
