"""The innermost loop of every measurement, for this process and for the worker."""

import gc
import time
from collections.abc import Callable
from itertools import repeat

import torch

__all__ = ["UNTIMED_CALL_BELOW", "seconds_per_call", "settle_allocator"]

# A slower call takes so long that what the contender before it left in the caches does not matter.
UNTIMED_CALL_BELOW = 0.05


def settle_allocator() -> None:
    """Bring the C library's allocator to the state that it has in a training process.

    As large tensors are freed, glibc raises the sizes from which it maps new pages and gives pages back, to
    at most 32 and 64 MiB. Without this, what a case costs would depend on the cases before it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def seconds_per_call(
    call: Callable[[], object],
    calls: int,
    *,
    untimed_call: bool,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Mean time of ``calls`` calls in a row, after one that is not counted if so wished."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if untimed_call:
            call()
        start = clock()
        for _ in repeat(None, calls):
            call()
        return (clock() - start) / calls
    finally:
        if was_enabled:
            gc.enable()
