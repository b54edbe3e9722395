"""Random cases for the operations, and comparison down to the last bit."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from coreai_kernels import Format, ScaleFormat, Scheme
from coreai_kernels.types import grid_shape

INTEGER_RANGES = [
    *((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 9)),
    *((0, 2**bits - 1) for bits in range(2, 9)),
    (-7, 7),
    (-127, 127),
    (-100, 37),
    (1, 200),
]
FLOAT_RANGES = {Format.E4M3: 448.0, Format.E5M2: 57344.0, Format.E2M1: 6.0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = [
    0.0,
    -0.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e-41,
    -3e-39,
    3e38,
    -3e38,
    0.5,
    -0.5,
    65504.0,
]


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal shape, dtype and bits; any NaN equals any other."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype} is not {expected.dtype}"
    if not actual.dtype.is_floating_point:
        same = actual == expected
    else:
        wide, other = actual.float(), expected.float()
        same = ((wide == other) & (wide.signbit() == other.signbit())) | (wide.isnan() & other.isnan())
        if actual.dtype == torch.float64:
            same = same & ((actual == expected) | actual.isnan())
    if not bool(same.all()):
        index = tuple((~same).nonzero()[0].tolist())
        count = int((~same).sum())
        raise AssertionError(
            f"{what}: {count} of {same.numel()} differ, first at {index}: "
            f"{actual[index].item()!r} is not {expected[index].item()!r}"
        )


def assert_same_memory_format(actual: Tensor, expected: Tensor) -> None:
    sizes = [i for i, size in enumerate(expected.shape) if size > 1]
    assert [actual.stride(i) for i in sizes] == [expected.stride(i) for i in sizes]


@dataclass
class Case:
    """An input of some memory layout, its blocks, and a number format."""

    shape: tuple[int, ...]
    block_size: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    format: Format
    quant_min: float
    quant_max: float
    seed: int
    special: bool
    magnitude: float = 1.0
    extra: dict[str, object] = field(default_factory=dict)

    def tensor(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1000 * seed)
        return self.laid_out(self._values(generator))

    def laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "transposed" and x.dim() >= 2:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "channels_last" and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if self.layout == "sliced" and x.dim() >= 1:
            wide = torch.zeros([*x.shape[:-1], 2 * x.shape[-1] + 1], dtype=x.dtype)
            view = wide[..., 1::2]
            view.copy_(x)
            return view
        if self.layout == "expanded" and x.dim() >= 1:
            return x[..., :1].expand(x.shape)
        return x

    def _values(self, generator: torch.Generator) -> Tensor:
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.magnitude
        if self.dtype != torch.float64:
            x = x.float()
        if self.special and x.numel():
            # No place twice: which of two assignments stays is not defined.
            chosen = torch.randperm(x.numel(), generator=generator)[: max(1, x.numel() // 16)]
            which = torch.randint(0, len(SPECIAL), chosen.shape, generator=generator)
            x.view(-1)[chosen] = torch.tensor(SPECIAL, dtype=x.dtype)[which]
        return x.to(self.dtype)

    @property
    def grid(self) -> tuple[int, ...]:
        return grid_shape(torch.Size(self.shape), self.block_size)

    def suited(self, scale_format: ScaleFormat, scheme: Scheme) -> ScaleFormat:
        """The scale format, or FLOAT32 if the values cannot have it."""
        around_zero = scheme != Scheme.ASYMMETRIC and -self.quant_min >= self.quant_max
        can_be_integers = scale_format != ScaleFormat.E4M3 and around_zero
        return scale_format if self.format != Format.INT or can_be_integers else ScaleFormat.FLOAT32

    @property
    def quant(self) -> dict[str, object]:
        return {
            "block_size": self.block_size,
            "format": self.format,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
        }


@st.composite
def cases(draw: st.DrawFn, max_side: int = 40, formats: list[Format] | None = None) -> Case:
    dims = draw(st.integers(0, 4))
    limit = {0: 1, 1: 700, 2: max_side, 3: 17, 4: 9}[dims]
    grid, block = [], []
    for _ in range(dims):
        size = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 27, 31, 32, 33, 64, 100, 257]))
        size = min(size, limit)
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        b = draw(st.sampled_from([1, size, draw(st.sampled_from(divisors))]))
        grid.append(size // b)
        block.append(b)
    format = draw(st.sampled_from(formats or list(Format)))
    if format == Format.INT:
        quant_min, quant_max = draw(st.sampled_from(INTEGER_RANGES))
    else:
        largest = FLOAT_RANGES[format]
        # Who narrows a range may do so on one side.
        parts = st.sampled_from([(1, 1), (1, 1), (0.25, 1), (1, 0.25), (0, 1)])
        quant_min, quant_max = (part * largest for part in draw(parts))
        quant_min = -quant_min
    return Case(
        shape=tuple(g * b for g, b in zip(grid, block, strict=True)),
        block_size=tuple(block),
        layout=draw(st.sampled_from(["contiguous", "transposed", "channels_last", "sliced", "expanded"])),
        dtype=draw(st.sampled_from(DTYPES)),
        format=format,
        quant_min=quant_min,
        quant_max=quant_max,
        seed=draw(st.integers(0, 999)),
        special=draw(st.booleans()),
        magnitude=draw(st.sampled_from([1.0, 1e-3, 1e4, 1e-30])),
    )
