"""The process that runs under callgrind: makes each case's calls and has the counts written."""

import ctypes
import gc
import sys
from collections.abc import Callable

import torch

from benchmarks.instructions.cases import CALLS, KERNELS
from coreai_kernels import native

__all__ = ["AMOUNTS", "main"]

AMOUNTS = {"kernels": (1 << 14, 1 << 15), "calls": (20, 60)}
"""Elements, or calls, of the two measurements whose difference counts."""


def main(library: str, levels: list[str]) -> None:
    """Count all cases: the kernels at these instruction sets, calls at the last of them."""
    requests = ctypes.CDLL(library)
    gc.disable()
    torch.set_num_threads(1)
    # Valgrind is slow in proportion to what it counts: all but the calls themselves is done before.
    prepared: list[tuple[str, str, Callable[[], object]]] = []
    for name, make in KERNELS.items():
        for amount in AMOUNTS["kernels"]:
            call = make(amount)
            prepared += [(level, f"{level}|{name}|{amount}", call) for level in levels]
    for name, simulator in CALLS.items():
        calls = simulator()
        prepared += [(levels[-1], f"calls|{name}|{amount}", calls(amount)) for amount in AMOUNTS["calls"]]
    for level, _, call in prepared:
        native.extension.set_cpu_capability(level)
        call()
    requests.start_counting()
    for level, name, call in prepared:
        native.extension.set_cpu_capability(level)
        requests.zero_counts()
        call()
        requests.dump_counts(name.encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
