"""bfloat16 by scales that are bfloat16: CPU kernels have ways of their own for these, which divide nothing.

That they are exact rests on how few bits there are: all mantissas of a scale meet all elements near it.
"""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, ScaleFormat, Scheme
from tests.kernels.support import SPECIAL, assert_same_bits

CASES = [
    pytest.param(Format.INT, -8, 7, 0, id="int4"),
    pytest.param(Format.INT, -128, 127, 0, id="int8"),
    pytest.param(Format.INT, 0, 15, 6, id="uint4"),
    pytest.param(Format.INT, 0, 255, 128, id="uint8"),
    pytest.param(Format.INT, 0, 255, 3, id="uint8 far from its middle"),
    pytest.param(Format.INT, -8, 7, -20, id="range without zero"),
    pytest.param(Format.E4M3, -448, 448, 0, id="e4m3"),
    pytest.param(Format.E4M3, -100, 100, 0, id="e4m3 clipped"),
    pytest.param(Format.E5M2, -57344, 57344, 0, id="e5m2"),
    pytest.param(Format.E2M1, -6, 6, 0, id="e2m1"),
]


def from_words(words: Tensor) -> Tensor:
    return words.to(torch.int16).view(torch.bfloat16)


def elements_near(exponent: int, binades: int) -> Tensor:
    """Every bfloat16 of either sign at most so many binades away."""
    first, last = max(0, exponent - binades) << 7, min(255, exponent + binades) << 7
    magnitudes = torch.arange(first, last)
    return from_words(torch.cat([magnitudes, magnitudes - 2**15]))


def mantissas(exponent: int) -> Tensor:
    """All numbers of a binade, one a row."""
    return from_words(((exponent + 127) << 7) + torch.arange(128)).unsqueeze(1)


def assert_same(results: dict[str, list[Tensor]]) -> None:
    for i, (got, wanted) in enumerate(zip(results["auto"], results["reference"], strict=True)):
        assert_same_bits(got, wanted, f"result {i}")


def compare(x: Tensor, scale: Tensor, zero_point: int, block: tuple[int, ...], **config: object) -> None:
    results: dict[str, list[Tensor]] = {}
    if config["format"] == Format.INT:
        config["zero_point"] = torch.full(scale.shape, zero_point, dtype=torch.int32)
    for backend in ("reference", "auto"):
        leaf = x.clone().requires_grad_()
        with ck.use_backend(backend):
            y = ck.fake_quantize(leaf, scale, block_size=block, **config)
            y.backward(torch.ones_like(x))
        results[backend] = [y.detach(), leaf.grad]
    assert_same(results)


@pytest.mark.parametrize("exponent", [-65, -5, 64])
@pytest.mark.parametrize(("fmt", "low", "high", "zero_point"), CASES)
def test_every_mantissa_and_element(fmt: Format, low: int, high: int, zero_point: int, exponent: int) -> None:
    scale = mantissas(exponent)[:: 1 if exponent == -5 else 25].float()
    binades = 19 if fmt == Format.E5M2 else 11  # what the format has, and some
    x = torch.cat([elements_near(exponent + 127, binades), torch.tensor(SPECIAL).bfloat16()]).expand(
        len(scale), -1
    )
    config = {"format": fmt, "quant_min": low, "quant_max": high}
    compare(x, scale, zero_point, (1, x.shape[1]), **config)
    # Some as channels of the last axis.
    x, scale = x[::4], scale[::4]
    compare(x.t().contiguous(), scale.t().contiguous(), zero_point, (x.shape[1], 1), **config)


def step(x: Tensor, block: int, **config: object) -> None:
    """Two steps with a running range, the second of which reads it."""
    grid = (x.shape[0], x.shape[1] // block)
    results: dict[str, list[Tensor]] = {}
    for backend in ("reference", "auto"):
        state = {"scale": torch.zeros(grid)}
        if config["format"] == Format.INT:
            state |= {"zero_point": torch.zeros(grid, dtype=torch.int32), "minval": torch.zeros(grid)}
        state |= {name: torch.zeros(grid, dtype=x.dtype) for name in ("running_min", "running_max")}
        results[backend] = []
        for turn in range(2):
            leaf = x.roll(turn, 0).requires_grad_()
            with ck.use_backend(backend):
                y = ck.observe_and_fake_quantize(
                    leaf,
                    **state,
                    **config,
                    block_size=(1, block),
                    update=RangeUpdate.MOVING_AVERAGE,
                    has_running=turn > 0,
                    averaging_constant=0.25,
                )
                y.backward(torch.ones_like(x))
            results[backend] += [y.detach(), leaf.grad, *(value.clone() for value in state.values())]
    assert_same(results)


@pytest.mark.parametrize("scheme", [Scheme.SYMMETRIC, Scheme.ASYMMETRIC])
@pytest.mark.parametrize(("fmt", "low", "high", "zero_point"), CASES)
def test_every_largest_element(fmt: Format, low: int, high: int, zero_point: int, scheme: Scheme) -> None:
    """Rows of all elements below the largest of the row, which sets the scale."""
    largest = mantissas(1)
    x = torch.minimum(torch.maximum(elements_near(120, 9).expand(128, -1), -largest), largest)
    step(x, x.shape[1], format=fmt, quant_min=low, quant_max=high, scheme=scheme)


@pytest.mark.parametrize("scale_format", list(ScaleFormat), ids=lambda scale: scale.name)
@pytest.mark.parametrize("block", [32, 40, 96])
@pytest.mark.parametrize(("fmt", "low", "high", "zero_point"), CASES)
def test_blocks(
    fmt: Format, low: int, high: int, zero_point: int, block: int, scale_format: ScaleFormat
) -> None:
    """Multiples of half a scale, many of them between two values; and blocks of special elements."""
    generator = torch.Generator().manual_seed(block)
    blocks = 16 * 20 + 5
    unit = 2.0 ** torch.randint(-20, 20, (blocks, 1), generator=generator)
    unit *= 1 + torch.randint(0, 128, (blocks, 1), generator=generator) / 128
    x = unit / 2 * torch.randint(-20, 21, (blocks, block), generator=generator)
    x[::3] *= torch.rand(len(x[::3]), block, generator=generator)
    x[1], x[2], x[3, 0], x[40, 3] = 0.0, -0.0, float("nan"), -float("inf")
    x[80, : len(SPECIAL)] = torch.tensor(SPECIAL)
    x[100] *= 2.0**-110
    x[120, 1] = -(2.0**90)
    config = {"format": fmt, "quant_min": low, "quant_max": high, "scheme": Scheme.SYMMETRIC}
    suits = fmt != Format.INT or (-low >= high and scale_format != ScaleFormat.E4M3)
    step(x.bfloat16(), block, **config, scale_format=scale_format if suits else ScaleFormat.FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(35, 96), (16, 33), (1, 64), (70, 128)], ids=str)
def test_range_of_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[:, 1], x[:, 2], x[:, 5] = -0.0, x[:, 2].abs() + 1, -x[:, 5].abs() - 1
    x[0, 3], x[-1, 4], x[0, 7] = float("nan"), -float("inf"), -float("nan")
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = [*ck.observe_range(x.to(dtype), block_size=(shape[0], 1))]
    assert_same(results)
