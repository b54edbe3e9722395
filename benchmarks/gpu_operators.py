"""The GPU check's benchmarks of masks and palettes: the CPU's cases, with their tensors on the GPU."""

from collections.abc import Iterator, Sequence

from benchmarks.cases import Case, Sweep
from benchmarks.harness import Bench, Operation
from benchmarks.ops import block_mask, lookup, nm_mask, palettize, soft_palettize, topk_mask
from benchmarks.ops.operators import on_device

__all__ = ["operator_benches"]

_OPERATIONS: Sequence[Operation] = (topk_mask, nm_mask, block_mask, palettize, lookup, soft_palettize)


def operator_benches(sizes: Sequence[int], device: str) -> Iterator[tuple[Case, Bench]]:
    """Each case, made ready on the device; its contenders have to be called before the next one is asked for.

    Args:
        sizes: rows of the square matrices.
        device: where the operators run.
    """
    sweep = Sweep(tuple(sizes), ("fp32", "bf16"), threads=(1,))
    for operation in _OPERATIONS:
        for case in operation.cases(sweep):
            with on_device(device):
                bench = operation.build(case)
            yield case, bench
            bench.release()
