"""What one compressed tensor takes, from the simulators that it goes through."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from coreai_opt.config.spec.compression_simulator import CompressionSimulatorBase, Storage

__all__ = ["dense_bits", "is_off", "simulated_bits"]


class _Sizes(NamedTuple):
    value_bits: float
    extra_bits: int
    kept: int


def dense_bits(tensor: Tensor) -> int:
    """The bits of all elements in the tensor's own dtype."""
    return tensor.numel() * tensor.element_size() * 8


def simulated_bits(original: Tensor, simulators: Sequence[CompressionSimulatorBase]) -> int:
    """The bits of a tensor that goes through ``simulators``.

    Raises:
        NotImplementedError: one of them is of a kind that says nothing about its storage.
    """
    sizes = _Sizes(float(original.element_size() * 8), 0, original.numel())
    for simulator in simulators:
        if not is_off(simulator):
            sizes = _after(sizes, simulator.storage(original))
    dense = math.ceil(original.numel() * sizes.value_bits)
    sparse = math.ceil(sizes.kept * sizes.value_bits) + original.numel()
    return min(dense, sparse) + sizes.extra_bits


def _after(sizes: _Sizes, storage: Storage) -> _Sizes:
    kept = sizes.kept if storage.kept is None else min(sizes.kept, storage.kept)
    if storage.value_bits is None:
        return sizes._replace(kept=kept)
    return _Sizes(storage.value_bits, storage.extra_bits, kept)


def is_off(simulator: CompressionSimulatorBase) -> bool:
    """Whether the simulator gave up on its tensor, which passes as it is."""
    disabled = getattr(simulator, "is_disabled", None)
    return bool(disabled() if callable(disabled) else disabled)
