"""Quotients next to where rounding and clamping change, of which some CPU kernels compute no division.

The kernels may multiply by a reciprocal and correct. That this is as good as a division around every number
of up to nine bits was seen by trying all 2**23 mantissas of a scale; here, random ones.
"""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, Scheme
from tests.kernels.support import assert_same_bits

SCALES = 500
# Where a rounded or clamped value changes, in units of the scale; all are numbers of few bits.
STEPS = {
    Format.INT: torch.arange(-256, 256) + 0.5,
    Format.E4M3: torch.cat(
        [torch.arange(1, 33) / 16 * 2.0**e for e in range(-6, 9)] + [torch.tensor([448.0])]
    ),
    Format.E5M2: torch.cat(
        [torch.arange(1, 17) / 8 * 2.0**e for e in range(-14, 16)] + [torch.tensor([57344.0])]
    ),
    Format.E2M1: torch.arange(0, 33) / 4,
}
RANGES = {
    Format.INT: [(-8, 7), (-128, 127), (0, 255)],
    Format.E4M3: [(-448, 448), (-100.3, 100.3)],
    Format.E5M2: [(-57344, 57344)],
    Format.E2M1: [(-6, 6)],
}
CASES = [pytest.param(fmt, *bounds, id=f"{fmt.name} {bounds}") for fmt in Format for bounds in RANGES[fmt]]


def neighbours(x: Tensor) -> Tensor:
    """Each value and the two before and behind it, along the last axis."""
    bits = x.contiguous().view(torch.int32)
    return torch.cat([(bits + d).view(torch.float32) for d in (-2, -1, 0, 1, 2)], -1)


def scales(generator: torch.Generator) -> Tensor:
    """Random mantissas, a few at the ends of a binade, of magnitudes up to those that need a division."""
    mantissas = 1 + torch.randint(0, 2**23, (SCALES, 1), generator=generator) * 2.0**-23
    mantissas[:3, 0] = torch.tensor([1.0, 1 + 2.0**-23, 2 - 2.0**-23])
    exponents = torch.randint(-70, 70, (SCALES, 1), generator=generator)
    exponents[::2] = torch.randint(-12, 2, (len(exponents[::2]), 1), generator=generator)
    return mantissas * 2.0 ** exponents.float()


def both(x: Tensor, scale: Tensor, **config: object) -> None:
    results = []
    for backend in ("reference", "auto"):
        leaf = x.clone().requires_grad_()
        with ck.use_backend(backend):
            y = ck.fake_quantize(leaf, scale, block_size=(1, x.shape[1]), **config)
            y.backward(torch.ones_like(x))
        results.append((y.detach(), leaf.grad))
    for wanted, got, what in zip(*results, ("output", "gradient"), strict=True):
        assert_same_bits(got, wanted, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fmt", "low", "high"), CASES)
def test_given_scales(fmt: Format, low: float, high: float, dtype: torch.dtype) -> None:
    scale = scales(torch.Generator().manual_seed(7))
    steps = torch.cat([STEPS[fmt], torch.tensor([low, high])])
    x = neighbours(scale * steps)
    x[0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    x = torch.cat([x, torch.full_like(x[:, :7], -0.0)], 1).to(dtype)
    config = {"quant_min": low, "quant_max": high, "format": fmt}
    both(x, scale, **config)
    if fmt == Format.INT:
        both(x, scale, zero_point=torch.randint(-3, 4, scale.shape, dtype=torch.int32), **config)
        both(x, scale, minval=-7.3 * scale, **config)


@pytest.mark.parametrize("block", [32, 96, 1024])
@pytest.mark.parametrize(("fmt", "low", "high"), CASES)
def test_observed_scales(fmt: Format, low: float, high: float, block: int) -> None:
    """The largest value of a block sets its scale; the others lie next to the steps that follow from it."""
    generator = torch.Generator().manual_seed(block)
    rows = 1 << 16 >> block.bit_length()
    largest = scales(generator)[torch.randint(0, SCALES, (rows,), generator=generator)]
    config = {"scheme": Scheme.SYMMETRIC, "quant_min": low, "quant_max": high, "format": fmt}
    scale, _, _ = ck.choose_qparams(-largest, largest, **config)
    chosen = torch.randint(0, len(STEPS[fmt]), (rows, block), generator=generator)
    x = scale * STEPS[fmt][chosen]
    offsets = torch.randint(-2, 3, x.shape, generator=generator, dtype=torch.int32)
    x = (x.view(torch.int32) + offsets * (x != 0)).view(torch.float32)
    x = torch.minimum(torch.maximum(x, -largest), largest)
    x[:, :1] = largest
    x[::5, 1] = -0.0
    x[1, 3], x[2, 3] = float("nan"), -float("inf")
    results = []
    for backend in ("reference", "auto"):
        state = torch.zeros(rows, 1)
        leaf = x.clone().requires_grad_()
        with ck.use_backend(backend):
            y = ck.observe_and_fake_quantize(leaf, state, block_size=(1, block), **config)
            y.backward(torch.ones_like(x))
        results.append((y.detach(), leaf.grad, state))
    for wanted, got, what in zip(*results, ("output", "gradient", "scale"), strict=True):
        assert_same_bits(got, wanted, what)
