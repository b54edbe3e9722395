"""Blocks of one element a row: channels of the innermost axis, which have a loop of their own."""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, Scheme
from tests.kernels.support import SPECIAL, assert_same_bits

pytestmark = pytest.mark.usefixtures("isa")

# Whole pairs of vectors, one vector more, part of one; an axis more; more rows and columns than one tile has.
SHAPES = [(4, 32), (9, 48), (7, 72), (5, 8), (1, 40), (3, 5, 64), (2, 3, 24), (66, 1064)]
FORMATS = [
    (Format.INT, -8.0, 7.0),
    (Format.INT, -128.0, 127.0),
    (Format.E4M3, -448.0, 448.0),
    (Format.E2M1, -6.0, 6.0),
]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, *, special: bool, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if special:
        places = x.view(-1)[3::2][: len(SPECIAL)]
        places.copy_(torch.tensor(SPECIAL)[: len(places)])
    return x.to(dtype)


def blocks(shape: tuple[int, ...], channels: str) -> tuple[int, ...]:
    """Channels of the last axis; or of the first as well, so that only some rows share their parameters."""
    outer = shape[:-2] if channels == "last" else (1,) * (len(shape) - 2)
    return (*outer, shape[-2], 1)


@pytest.mark.parametrize("channels", ["last", "outer and last"])
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_and_quantization(
    shape: tuple[int, ...], dtype: torch.dtype, special: bool, channels: str
) -> None:
    block = blocks(shape, channels)
    grid = tuple(size // extent for size, extent in zip(shape, block, strict=True))
    for fmt, low, high in FORMATS:
        config = {"block_size": block, "format": fmt, "quant_min": low, "quant_max": high}
        found: dict[str, list[Tensor]] = {}
        for backend in ("reference", "auto"):
            state = {"scale": torch.zeros(grid)}
            if fmt == Format.INT:
                state |= {"zero_point": torch.zeros(grid, dtype=torch.int32), "minval": torch.zeros(grid)}
            x = tensor(shape, dtype, special=special).requires_grad_()
            with ck.use_backend(backend):
                step = ck.observe_and_fake_quantize(
                    x, **state, **config, scheme=Scheme.ASYMMETRIC, update=RangeUpdate.LATEST
                )
                step.backward(tensor(shape, dtype, special=special, seed=1))
                params = {name: state[name] for name in state if name != "minval"}
                # Other values than those that gave the parameters: some are out of range.
                plain = ck.fake_quantize(
                    2 * tensor(shape, dtype, special=special, seed=2), **params, **config
                )
            assert x.grad is not None
            found[backend] = [step.detach(), x.grad, plain, *state.values()]
        for got, wanted in zip(found["auto"], found["reference"], strict=True):
            assert_same_bits(got, wanted, f"{fmt.name} {shape} {channels}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last(dtype: torch.dtype) -> None:
    """Channels are columns in memory order; one has a NaN, one is wide, one is all zeros."""
    x = tensor((3, 72, 5, 7), dtype, special=False).to(memory_format=torch.channels_last)
    x[1, 3, 2, 2], x[:, 5], x[:, 40] = float("nan"), 1e30, 0.0
    found: dict[str, list[Tensor]] = {}
    for backend in ("reference", "auto"):
        state = {"scale": torch.zeros(1, 72, 1, 1), "zero_point": torch.zeros(1, 72, 1, 1, dtype=torch.int32)}
        leaf = x.clone().requires_grad_()
        with ck.use_backend(backend):
            y = ck.observe_and_fake_quantize(
                leaf,
                **state,
                minval=torch.zeros(1, 72, 1, 1),
                block_size=(3, 1, 5, 7),
                format=Format.INT,
                quant_min=-8,
                quant_max=7,
                scheme=Scheme.SYMMETRIC,
                update=RangeUpdate.LATEST,
            )
            y.backward(torch.ones_like(x))
        assert leaf.grad is not None
        found[backend] = [y.detach(), leaf.grad, *state.values()]
    for got, wanted in zip(found["auto"], found["reference"], strict=True):
        assert_same_bits(got, wanted)
