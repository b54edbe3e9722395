"""Weights of a 2:4 pattern as torch's semi-structured sparse tensors."""

import warnings

import torch
from torch import nn

from coreai_opt.config.spec import CompressionSimulatorBase
from coreai_opt.pruning.spec.prune import PruneImplBase
from coreai_opt.pruning.spec.scheme import NMStructured

__all__ = ["store_semi_structured"]


def store_semi_structured(module: nn.Module, attribute: str, simulator: CompressionSimulatorBase) -> None:
    """Store the weight of a linear layer, pruned 2:4 along its inputs, as a semi-structured sparse tensor.

    Others stay as they are. So does a weight that torch refuses for its device, dtype or shape: with a
    warning that says why.
    """
    if not (isinstance(module, nn.Linear) and isinstance(simulator, PruneImplBase)):
        return
    scheme = simulator.pruning_scheme
    two_of_four = (
        isinstance(scheme, NMStructured) and (scheme.n, scheme.m) == (2, 4) and scheme.axis in (-1, 1)
    )
    if not two_of_four or simulator.sparsity < 0.5:
        return
    weight = getattr(module, attribute)
    try:
        stored = torch.sparse.to_sparse_semi_structured(weight.detach())
    except (RuntimeError, NotImplementedError, ValueError) as error:
        warnings.warn(
            f"{simulator.tensor_fqn} stays dense: torch has no semi-structured form of {weight.dtype} in "
            f"shape {tuple(weight.shape)} on {weight.device}: {error}",
            UserWarning,
            stacklevel=3,
        )
        return
    setattr(module, attribute, nn.Parameter(stored, requires_grad=False))
