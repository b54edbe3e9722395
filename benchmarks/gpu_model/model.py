"""From a kernel's machine code to the share of the copy bandwidth that a GPU can reach with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_model.devices import DEVICES, Device

__all__ = ["Kernel", "shares"]


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


def shares(kernels: Sequence[Kernel], bytes_moved: float, name: str) -> dict[str, Any]:
    """What the GPU ``name`` of :data:`DEVICES` can reach.

    Args:
        kernels: of one operation, compiled for that GPU.
        bytes_moved: the least that the operation reads and writes for an element.
        name: of the GPU.

    Returns:
        ``"share"``: of the bandwidth of a copy of these bytes; ``"bound"``: by what; and of the kernel that
        takes longest ``"occupancy"``, the share of a multiprocessor's threads that it fills, and
        ``"kib_in_flight"``, what these have asked memory for before they wait.
    """
    device = DEVICES[name]
    seconds = [_seconds(kernel, device) for kernel in kernels]
    longest = max(range(len(kernels)), key=lambda i: max(seconds[i].values()))
    kernel = kernels[longest]
    threads = device.threads_at_once(kernel.threads_in_block, kernel.registers, kernel.shared)
    total = sum(max(each.values()) for each in seconds)
    return {
        "share": bytes_moved / device.copy_bandwidth / total,
        "bound": max(seconds[longest], key=seconds[longest].__getitem__),
        "occupancy": threads / device.threads,
        "kib_in_flight": threads * kernel.in_flight / 1024,
    }


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
