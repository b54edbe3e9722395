"""A pruning mask as ``import coreai_opt`` makes it: of Apple's package and of ours, by the same calls."""

import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.cases import Case, make_input

__all__ = ["PRUNING", "SPARSITIES", "Pruning"]

PRUNING = "pruning"
"""Name of the operation."""
SPARSITIES = {"50 %": 0.5, "75 %": 0.75, "90 %": 0.9}


class Pruning:
    """The mask of a case's matrix. The case's format is the sparsity, its granularity the scheme."""

    def __init__(self, case: Case) -> None:
        from coreai_opt.pruning.spec import ChannelStructured, PruneImplBase, Unstructured

        self.compute: Any = PruneImplBase.get_class("default").compute_mask
        self.sparsity = SPARSITIES[case.format]
        axis = case.granularity.removeprefix("channel ")
        self.scheme: Any = ChannelStructured(axis=int(axis)) if axis.isdigit() else Unstructured()
        self.input = make_input(case)

    def mask(self) -> Tensor:
        return self.compute(self.input, self.sparsity, self.scheme)  # type: ignore[no-any-return]

    def call(self, phase: str) -> Callable[[], object]:
        """What a sample repeats."""
        return self.mask

    def digest(self) -> str:
        """Number of ones: with ties, which 16-bit weights have, packages need not agree on more."""
        ones = int(self.mask().count_nonzero())
        return hashlib.blake2b(str(ones).encode(), digest_size=16).hexdigest()
