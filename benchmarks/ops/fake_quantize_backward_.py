"""``fake_quantize_backward_``: the gradient masked in place, as when nobody else holds it.

What it moves depends on where the mask has zeros: next to none for a whole tensor, one in every other block
for symmetric blocks. The floor is the other operator's, which reads and writes all.
"""

from collections.abc import Iterator

from benchmarks.cases import Case, Sweep
from benchmarks.harness import Bench
from benchmarks.ops.fake_quantize_backward import gradient_and_mask
from benchmarks.ops.operators import bench_of
from coreai_kernels.ops.library import implementation

__all__ = ["build", "cases"]


def cases(sweep: Sweep) -> Iterator[Case]:
    full = [("int8", "tensor"), ("int8", "channel 0"), ("int4", "block 32")]
    return sweep.over("fake_quantize_backward_", sweep.select(full, full[:1]))


def build(case: Case) -> Bench:
    grad, mask, floor = gradient_and_mask(case)
    bench = bench_of(case, "fake_quantize_backward_", (grad, mask, []), floor, 0)
    copied = implementation("fake_quantize_backward")
    bench.contenders["to another tensor"] = lambda: copied(grad, mask, [])
    return bench
