"""Random weights with palettes: shapes, layouts and values that the palette operations must take."""

import os
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.support import Case

__all__ = ["PaletteCase", "many", "palette_cases"]

# Fewer in the processes that repeat tests for another instruction set.
many = settings(max_examples=20 if "COREAI_CPU_CAPABILITY" in os.environ else 40, deadline=None)


@dataclass
class PaletteCase:
    """A weight of some memory layout in blocks, and a palette for each block."""

    weight: Case
    dim: int
    clusters: int
    palette_dtype: torch.dtype
    palette: str

    @property
    def block_size(self) -> tuple[int, ...]:
        return self.weight.block_size

    @property
    def blocks(self) -> int:
        return torch.Size(self.weight.grid).numel()

    @property
    def indices_shape(self) -> tuple[int, ...]:
        shape = self.weight.shape
        return (shape[0] // self.dim, *shape[1:]) if shape else ()

    def tensor(self, seed: int = 0) -> Tensor:
        return self.weight.tensor(seed)

    def centroids(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.weight.seed)
        shape = (self.blocks, self.clusters, self.dim)
        values = torch.randn(shape, generator=generator) * self.weight.magnitude
        if self.palette == "coarse":  # equal ones and exact ties
            values = torch.randint(-3, 4, shape, generator=generator).float()
        if self.palette == "special" and values.numel():
            special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-41, 3e38])
            chosen = torch.rand(shape, generator=generator) < 0.25
            which = torch.randint(0, len(special), shape, generator=generator)
            values = torch.where(chosen, special[which], values)
        if self.palette == "ascending" and self.dim == 1:
            values = values.sort(dim=1).values
        return values.to(self.palette_dtype)

    def indices(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.weight.seed + 1)
        indices = torch.randint(0, self.clusters, self.indices_shape, generator=generator, dtype=torch.uint8)
        return self.weight.laid_out(indices)


@st.composite
def palette_cases(draw: st.DrawFn, max_clusters: int = 256, special: bool = True) -> PaletteCase:
    dims = draw(st.integers(0, 4))
    dim = draw(st.sampled_from([1, 1, 2, 3, 4, 9])) if dims else 1
    limit = {0: 1, 1: 700, 2: 40, 3: 17, 4: 9}[dims]
    grid, block = [], []
    for axis in range(dims):
        size = min(draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 257])), limit)
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        b = draw(st.sampled_from([1, size, draw(st.sampled_from(divisors))]))
        grid.append(size // b)
        block.append(b * dim if axis == 0 else b)
    palettes = ["random", "ascending", "coarse"] + ["special"] * special
    return PaletteCase(
        weight=Case(
            shape=tuple(g * b for g, b in zip(grid, block, strict=True)),
            block_size=tuple(block),
            layout=draw(st.sampled_from(["contiguous", "transposed", "channels_last", "sliced", "expanded"])),
            dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
            format=0,  # type: ignore[arg-type]
            quant_min=0,
            quant_max=0,
            seed=draw(st.integers(0, 999)),
            special=special and draw(st.booleans()),
            magnitude=draw(st.sampled_from([1.0, 1e-3, 1e4])),
        ),
        dim=dim,
        clusters=draw(
            st.sampled_from([k for k in (1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 255, 256) if k <= max_clusters])
        ),
        palette_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        palette=draw(st.sampled_from(palettes)),
    )
