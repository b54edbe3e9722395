"""What is measured: the vocabulary of formats, granularities, dtypes, and one case of it.

Imports neither package under test: the process that runs the other one uses this file, too.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import torch

__all__ = [
    "BLOCK_SCALED",
    "DTYPES",
    "FORMATS",
    "GRANULARITIES",
    "INT_FORMATS",
    "OTHER_INT_FORMATS",
    "Case",
    "Combinations",
    "NumberFormat",
    "Sweep",
    "geometric_mean",
    "make_input",
]


class NumberFormat(NamedTuple):
    """A quantized format: name in specs, name in the engine, range, storage, and dtype of rounded scales."""

    spec_dtype: str
    kernel_format: str
    quant_min: float
    quant_max: float
    storage: torch.dtype
    scale_dtype: str | None = None


FORMATS = {
    "int3": NumberFormat("int3", "INT", -4, 3, torch.int8),
    "int4": NumberFormat("int4", "INT", -8, 7, torch.int8),
    "int5": NumberFormat("int5", "INT", -16, 15, torch.int8),
    "int6": NumberFormat("int6", "INT", -32, 31, torch.int8),
    "int7": NumberFormat("int7", "INT", -64, 63, torch.int8),
    "int8": NumberFormat("int8", "INT", -128, 127, torch.int8),
    "nvfp4": NumberFormat("float4_e2m1fn", "E2M1", -6, 6, torch.float8_e4m3fn, "float8_e4m3fn"),
    "mxint8": NumberFormat("int8", "INT", -128, 127, torch.int8, "float8_e8m0fnu"),
    "fp8 e4m3": NumberFormat("float8_e4m3fn", "E4M3", -448, 448, torch.float8_e4m3fn),
    "fp8 e5m2": NumberFormat("float8_e5m2", "E5M2", -57344, 57344, torch.float8_e5m2),
    "fp4 e2m1": NumberFormat("float4_e2m1fn", "E2M1", -6, 6, torch.float8_e4m3fn, "float8_e8m0fnu"),
}
INT_FORMATS = ("int4", "int8")
# One operation measures them: kernels know integers by their range alone.
OTHER_INT_FORMATS = ("int3", "int5", "int6", "int7")
# Formats that are made for blocks, with theirs.
BLOCK_SCALED = (("fp4 e2m1", "block 32"), ("nvfp4", "block 16"), ("mxint8", "block 32"))
GRANULARITIES = ("tensor", "channel 0", "channel 1", "block 32")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One square matrix, quantized one way, on some threads.

    ``phase`` tells the simulator's forward from its forward and backward; ``variant`` names what else an
    operation offers: the calculator, the scheme, the direction.
    """

    op: str
    format: str
    granularity: str
    size: int
    dtype: str
    threads: int
    phase: str = ""
    variant: str = ""

    @property
    def key(self) -> str:
        """Identifies the case among runs."""
        return "/".join(str(value) for value in asdict(self).values())

    @property
    def numel(self) -> int:
        return self.size * self.size

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def number_format(self) -> NumberFormat:
        return FORMATS[self.format]

    @property
    def block_size(self) -> tuple[int, int]:
        n = self.size
        if self.granularity.startswith("block "):
            return 1, int(self.granularity.removeprefix("block "))
        return {"tensor": (n, n), "channel 0": (1, n), "channel 1": (n, 1)}[self.granularity]

    @property
    def row_wise(self) -> bool:
        """Whether a block is a piece of a row: one read suffices to observe and to quantize it."""
        return self.granularity == "channel 0" or self.granularity.startswith("block ")


Combinations = Sequence[tuple[str, str]]
"""Pairs of format and granularity."""


@dataclass(frozen=True)
class Sweep:
    """The sizes, dtypes and numbers of threads that a run goes through."""

    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    threads: tuple[int, ...]
    quick: bool = False

    def select(self, full: Combinations, quick: Combinations) -> Combinations:
        """The combinations for this run."""
        return quick if self.quick else full

    def over(self, op: str, combinations: Combinations, **more: Any) -> Iterator[Case]:
        """``op`` for pairs of format and granularity, at all sizes, dtypes and threads."""
        for (fmt, granularity), size, dtype, threads in product(
            combinations, self.sizes, self.dtypes, self.threads
        ):
            yield Case(op, fmt, granularity, size, dtype, threads, **more)


def make_input(case: Case, seed: int = 0) -> torch.Tensor:
    """Normally distributed values; the same ones in every process, and in memory that others may share."""
    return _normal(case.size, case.dtype, seed).detach()


@functools.lru_cache(maxsize=4)
def _normal(size: int, dtype: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, size, generator=generator).to(DTYPES[dtype])


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
