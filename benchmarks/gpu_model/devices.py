"""The GPUs that kernels are judged for."""

from dataclasses import dataclass

__all__ = ["DEVICES", "Device"]

# From asking global memory to having it, seconds: what microbenchmarks of these generations find, under load.
_LATENCY = 700e-9


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        arch: 90 for sm_90.
        copy_bandwidth: bytes a second that a copy reaches, reads and writes together: 0.9 of the data sheet,
            for the H200 as others have measured it.
        issue_rate: instructions of single threads a second, of all multiprocessors.
        multiprocessors: how many.
        registers, threads, shared: of a multiprocessor; bytes of shared memory.
    """

    arch: int
    copy_bandwidth: float
    issue_rate: float
    multiprocessors: int
    shared: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    def threads_at_once(self, in_block: int, registers: int, shared: int) -> int:
        """Threads of a kernel that a multiprocessor holds."""
        # Registers are given to warps in units of 256.
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // per_warp * 32 // in_block
        by_shared = self.shared // (shared + 1024) if shared else self.blocks
        return min(self.threads // in_block, by_registers, by_shared, self.blocks) * in_block

    def share_by_latency(self, bytes_in_flight: float) -> float:
        """Share of the copy bandwidth that bytes asked for on a multiprocessor allow (Little's law)."""
        return bytes_in_flight * self.multiprocessors / _LATENCY / self.copy_bandwidth


DEVICES = {
    "A100": Device(80, 0.9 * 2.039e12, 19.5e12, 108, 164 << 10),
    "H100": Device(90, 0.9 * 3.35e12, 30.9e12, 132, 228 << 10),
    "H200": Device(90, 4.3e12, 30.9e12, 132, 228 << 10),
    "B200": Device(100, 0.9 * 8.0e12, 35e12, 148, 228 << 10),
}
