"""``soft_palettize`` and ``soft_centroids``, both ways: what they cost is arithmetic, not memory."""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench
from benchmarks.ops.lookup import palette_of
from benchmarks.ops.operators import bench_of

__all__ = ["build", "cases"]

_TEMPERATURE = 0.01


def cases(sweep: Sweep) -> Iterator[Case]:
    for variant in ("soft_palettize", "soft_palettize_backward", "soft_centroids"):
        yield from sweep.over("soft_palettize", [("int4", "tensor")], variant=variant)


def build(case: Case) -> Bench:
    x, palette = make_input(case), palette_of(case)
    args = (x, palette, _TEMPERATURE, case.block_size)
    moved = x.nbytes
    if case.variant == "soft_palettize_backward":
        return bench_of(case, case.variant, (make_input(case, seed=1), *args), 3 * moved, moved)
    writes = 0 if case.variant == "soft_centroids" else moved
    return bench_of(case, case.variant, args, moved + writes, writes)
