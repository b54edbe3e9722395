"""Masks of our package against Apple's; outputs are allocated by each call, as in training."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.apple import Apple
from benchmarks.cases import Case, Sweep
from benchmarks.harness import NATIVE, Bench, Local
from benchmarks.ops.operators import REFERENCE_UP_TO
from benchmarks.pruning import PRUNING, SPARSITIES, Pruning
from benchmarks.simulator import add_apple
from coreai_kernels import use_backend

__all__ = ["Suite"]

_FULL = [*((sparsity, "tensor") for sparsity in SPARSITIES), ("50 %", "channel 0"), ("50 %", "channel 1")]
_QUICK = [("75 %", "tensor"), ("50 %", "channel 0")]


@dataclass(frozen=True)
class Suite:
    """Unstructured masks at three sparsities, and masks of channels."""

    apple: Apple | None

    def cases(self, sweep: Sweep) -> Iterator[Case]:
        return sweep.over(PRUNING, sweep.select(_FULL, _QUICK))

    def build(self, case: Case) -> Bench:
        pruning = Pruning(case)
        reads = 2 if case.granularity == "tensor" else 1
        bench = Bench(
            {NATIVE: pruning.mask},
            case.numel * (reads + 1) * case.element_bytes,
            pruning.input.nbytes,
        )
        if case.size <= REFERENCE_UP_TO:
            bench.contenders["reference"] = Local(pruning.mask, lambda: use_backend("reference"))
        if self.apple is not None:
            add_apple(bench, case, self.apple, pruning.digest())
        return bench
