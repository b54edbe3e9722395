"""The forward of a model that simulates its small weights together, before anything else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from coreai_opt.quantization._eager.interception import ReplacedForward
from coreai_opt.quantization._eager.weights import (
    Shelf,
    WeightRead,
    are_saved_tensors_hooked,
    gives_the_same_again,
    install_reads,
)
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase
from coreai_opt.quantization.spec.kept_launches import KeptLaunches
from coreai_opt.quantization.spec.together import simulate_together

__all__ = ["install_weight_access"]

# Elements from which on a weight is worth a launch of its own.
_LARGE = 1 << 17

# The reads of one simulator, which share its output.
Shared = list[WeightRead]


def install_weight_access(model: nn.Module) -> None:
    """Make reads of the model's simulated weights cheaper."""
    reads = install_reads(model)
    if len(reads) > 1:
        TogetherForward(model, reads).install()


class TogetherForward(ReplacedForward):
    """The forward of the whole model.

    Args:
        model: the model.
        reads: its simulated weights.
    """

    def __init__(self, model: nn.Module, reads: list[WeightRead]) -> None:
        super().__init__(model)
        by_simulator: dict[FakeQuantizeImplBase, Shared] = {}
        for read in reads:
            by_simulator.setdefault(read.pair[0], []).append(read)
        self.reads = list(by_simulator.values())
        self._known: _Division | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": None}

    def of_replica(self, replica: nn.Module) -> Callable[..., Any] | None:
        """What a replica runs: it has weights of its own, for a single forward."""
        return self._displaced_of(replica)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        module = self.module
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or are_saved_tensors_hooked():
            return self._run(module, args, kwargs)
        known = self._known
        if known is None or not (known.is_valid() and known.fill()):
            known = self._known = _Division(self.reads, known)
            known.fill()
        try:
            return self._run(module, args, kwargs)
        finally:
            known.clear()


class _Division:
    """Which weights go in launches that are kept from forward to forward, which in others, and which in none.

    Args:
        reads: all reads.
        last: the division before this one.
    """

    def __init__(self, reads: list[Shared], last: "_Division | None") -> None:
        chosen: list[Shared] = []
        self._single: list[Shared] = []
        needed = [[read for read in shared if read.is_needed] for shared in reads]
        for shared in filter(None, needed):
            (chosen if _can_be_shared(shared) else self._single).append(shared)
        pairs = [shared[0].pair for shared in chosen]
        simulators, originals = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self._launches = KeptLaunches(simulators, originals, [shared[0].places for shared in chosen])
        members = set(self._launches.members)
        self._kept = [chosen[i] for i in self._launches.members]
        self._others = [shared for i, shared in enumerate(chosen) if i not in members]
        # A simulator can be kept once it has observed: the next forward looks again at those that are not.
        self._is_settled = not self._others or (last is not None and last._others == self._others)
        self._shelf = Shelf()
        for i, shared in enumerate(self._kept + self._others):
            for read in shared:
                read.place_on(self._shelf, i)

    def is_valid(self) -> bool:
        """Whether it would be made the same again."""
        return (
            self._is_settled
            and self._launches.are_valid()
            and not any(_can_be_shared(shared) for shared in self._single if shared[0].is_needed)
        )

    def fill(self) -> bool:
        """Simulate what goes together, for the readers of the forward that begins.

        Returns:
            False if something has changed: then the division is not valid.
        """
        if len(self._kept) + len(self._others) < 2:
            return True
        outputs, originals = self._launches(), self._launches.tensors
        if outputs is None:
            return False
        if self._others:
            pairs = [shared[0].pair for shared in self._others]
            others = [original for _, original in pairs]
            outputs += simulate_together([simulator for simulator, _ in pairs], others)
            originals = originals + others
        self._shelf.fill(outputs, originals)
        return True

    def clear(self) -> None:
        """Forget what was simulated."""
        self._shelf.clear()


def _can_be_shared(shared: Shared) -> bool:
    simulator, original = shared[0].pair
    if type(original) is not nn.Parameter or not original.requires_grad or original.numel() >= _LARGE:
        return False
    flags = simulator._flags
    return gives_the_same_again(simulator) and flags.fake_quant and not flags.disabled
