"""From a kernel's machine code to the share of the copy bandwidth that a GPU can reach with it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_model.compiling import Launch, launches
from benchmarks.gpu_model.devices import DEVICES, Device
from benchmarks.gpu_model.machine_code import count, disassemble, resources
from benchmarks.gpu_model.variants import Variant

__all__ = ["Kernel", "examine", "shares"]


@dataclass(frozen=True)
class Kernel:
    """What one thread of a kernel does for one element of the large tensor.

    Attributes:
        name: of the kernel.
        arch: that it is compiled for.
        instructions: an element, on the main path.
        bytes_loaded, bytes_stored: an element.
        registers: of a thread.
        shared: bytes of a block.
        threads_in_block: how many.
        in_flight: bytes that a thread asks for before it waits.
    """

    name: str
    arch: int
    instructions: float
    bytes_loaded: float
    bytes_stored: float
    registers: int
    shared: int
    threads_in_block: int
    in_flight: int


def examine(variant: Variant, arch: int) -> list[Kernel]:
    """Compile what the operation launches, and follow each kernel's main path."""
    with tempfile.TemporaryDirectory() as folder:
        return [_examined(variant, launch, arch, Path(folder)) for launch in launches(arch, variant.run)]


def _examined(variant: Variant, launch: Launch, arch: int, folder: Path) -> Kernel:
    used = resources(launch.cubin, folder)
    per_thread = variant.elements / launch.threads
    counts = count(disassemble(launch.cubin, folder), per_thread * variant.read)
    return Kernel(
        name=launch.name,
        arch=arch,
        instructions=counts.instructions / per_thread,
        # Parameters of blocks are read by many threads, and come from the caches.
        bytes_loaded=min(counts.loaded / per_thread, variant.read),
        bytes_stored=min(counts.stored / per_thread, variant.written),
        registers=used["REG"],
        shared=used["SHARED"],
        threads_in_block=launch.threads_in_block,
        in_flight=counts.in_flight,
    )


def shares(variant: Variant, kernels: Sequence[Kernel], name: str) -> dict[str, Any]:
    """What the GPU ``name`` of :data:`DEVICES` can reach.

    Returns:
        ``"share"``: of the bandwidth of a copy of the operation's least bytes; ``"bound"``: by what.
    """
    device = DEVICES[name]
    least = (variant.read + variant.written) / device.copy_bandwidth
    times, bounds = [], []
    for kernel in kernels:
        seconds = _seconds(kernel, device)
        times.append(max(seconds.values()))
        bounds.append((max(seconds.values()), max(seconds, key=seconds.__getitem__)))
    return {"share": least / sum(times), "bound": max(bounds)[1]}


def _seconds(kernel: Kernel, device: Device) -> dict[str, float]:
    """The time that each resource takes for an element, on the whole GPU."""
    threads = device.threads_at_once(kernel.threads_in_block, kernel.registers, kernel.shared)
    memory = (kernel.bytes_loaded + kernel.bytes_stored) / device.copy_bandwidth
    by_latency = device.share_by_latency(2 * threads * kernel.in_flight)
    return {
        "memory": memory,
        "instructions": kernel.instructions / device.issue_rate,
        "latency": memory / by_latency if by_latency else float("inf"),
    }
