"""``lookup``, its masked and packed forms and its gradient: 16 or 256 centroids, one palette or one a row."""

from collections.abc import Iterator

import torch

import coreai_kernels
from benchmarks.cases import DTYPES, Case, Sweep
from benchmarks.harness import Bench
from benchmarks.ops.operators import bench_of

__all__ = ["COMBINATIONS", "QUICK_COMBINATIONS", "build", "cases", "palette_of"]

COMBINATIONS = [("int4", "tensor"), ("int4", "channel 0"), ("int8", "tensor")]
QUICK_COMBINATIONS = [("int4", "tensor")]
_BITS = {"int4": 4, "int8": 8}


def palette_of(case: Case) -> torch.Tensor:
    """Ascending centroids for each block, in the case's dtype."""
    blocks = case.numel // torch.Size(case.block_size).numel()
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(blocks, 2 ** _BITS[case.format], 1, generator=generator)
    return values.sort(dim=1).values.to(DTYPES[case.dtype])


def cases(sweep: Sweep) -> Iterator[Case]:
    combinations = sweep.select(COMBINATIONS, QUICK_COMBINATIONS)
    for variant in ("bytes", "masked", "packed", "backward"):
        yield from sweep.over("lookup", combinations, variant=variant)


def build(case: Case) -> Bench:
    bits, shape = _BITS[case.format], (case.size, case.size)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    palette, block = palette_of(case), case.block_size
    weight_bytes = case.numel * case.element_bytes
    if case.variant == "bytes":
        args = (indices, palette, block)
        return bench_of(case, "lookup", args, case.numel + weight_bytes, weight_bytes)
    if case.variant == "masked":
        mask = torch.rand(shape, generator=generator) < 0.5
        args = (indices, palette, block, mask)
        return bench_of(case, "lookup", args, 2 * case.numel + weight_bytes, weight_bytes)
    if case.variant == "packed":
        packed = coreai_kernels.pack_bits(indices, bits)
        args = (packed, palette, list(shape), block, bits)
        return bench_of(case, "lookup_packed", args, packed.nbytes + weight_bytes, weight_bytes)
    grad = torch.randn(shape, generator=generator).to(DTYPES[case.dtype])
    args = (grad, indices, block, 2**bits, 1)
    return bench_of(case, "lookup_backward", args, case.numel + weight_bytes, 4 * palette.numel())
