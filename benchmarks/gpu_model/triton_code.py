"""Triton's kernels in machine code: an operation's main path."""

import functools
import tempfile
from pathlib import Path

from benchmarks.gpu_model.compiling import launches
from benchmarks.gpu_model.machine_code import Counts, count, disassemble, resources
from benchmarks.gpu_model.model import Kernel
from benchmarks.gpu_model.triton_runs import Run

__all__ = ["kernels"]


def kernels(run: Run, arch: int, elements: int, read: float, written: float) -> list[Kernel]:
    """Compile what an operation launches, and follow each kernel's main path.

    Args:
        run: calls the operator.
        arch: 90 for sm_90.
        elements: of the large tensor.
        read, written: bytes of large tensors an element.
    """
    found = []
    for launch in launches(arch, run):
        per_thread = elements / launch.threads
        counts, used = _examined(launch.cubin, per_thread * read)
        found.append(
            Kernel(
                name=launch.name,
                arch=arch,
                instructions=counts.instructions / per_thread,
                # Parameters of blocks are read by many threads, and come from the caches.
                bytes_loaded=min(counts.loaded / per_thread, read),
                bytes_stored=min(counts.stored / per_thread, written),
                registers=used["REG"],
                shared=used["SHARED"],
                threads_in_block=launch.threads_in_block,
                in_flight=counts.in_flight,
            )
        )
    return found


@functools.lru_cache(maxsize=1024)
def _examined(cubin: bytes, bytes_to_read: float) -> tuple[Counts, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        used = resources(cubin, Path(folder))
        return count(disassemble(cubin, Path(folder)), bytes_to_read), used
