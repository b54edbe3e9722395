"""NVFP4: e2m1 values in blocks of 16, e4m3 scales of blocks under one float32 scale of the tensor."""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, ScaleFormat, Scheme
from tests.kernels.support import assert_same_bits

NVFP4 = {"format": Format.E2M1, "quant_min": -6.0, "quant_max": 6.0}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
BACKENDS = ["reference", "auto"]


def scales_of(x: Tensor, block: int = 16) -> Tensor:
    low, high = ck.observe_range(x, block_size=(1, block))
    return ck.choose_qparams(low, high, scheme=Scheme.SYMMETRIC, scale_format=ScaleFormat.E4M3, **NVFP4)[0]


def values(*shape: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator) * spread ** torch.randn(shape[0], 1, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_are_e4m3_numbers_times_one_of_the_tensor(backend: str) -> None:
    x = values(8, 64)
    with ck.use_backend(backend):
        scale = scales_of(x)
    of_tensor = x.abs().max() / (448 * 6)
    of_blocks = scale / of_tensor
    assert_same_bits(of_blocks.to(torch.float8_e4m3fn).float() * of_tensor, scale)
    assert of_blocks.max() == 448
    # Rounding to three bits of mantissa.
    wanted = x.abs().view(8, 4, 16).amax(2) / 6
    torch.testing.assert_close(scale, wanted, rtol=2.0**-4, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Largest magnitudes 2688 and 6.5: scale 1 of the tensor; 448 and e4m3(6.5 / 6) of the blocks."""
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([2688.0, 1000.0, -300.0])
    x[0, 16:20] = torch.tensor([6.5, -3.0, 0.3, 1.2])
    state = {"scale": torch.zeros(1, 2)}
    with ck.use_backend(backend):
        y = ck.observe_and_fake_quantize(
            x, **state, block_size=(1, 16), scheme=Scheme.SYMMETRIC, scale_format=ScaleFormat.E4M3, **NVFP4
        )
    assert state["scale"].tolist() == [[448.0, 1.125]]
    assert y[0, :3].tolist() == [2688.0, 896.0, -224.0]
    assert y[0, 16:20].tolist() == [6.75, -3.375, 0.5625, 1.125]
    assert not y[0, 3:16].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_zeros_and_of_tiny_values(backend: str) -> None:
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16] = 2688.0, 0.01  # the second block: 0.01 / 6 is less than half of the smallest e4m3
    with ck.use_backend(backend):
        assert scales_of(x).tolist() == [[448.0, 2.0**-9, 2.0**-9]]
        nothing = scales_of(torch.zeros(2, 32))
    assert (nothing > 0).all()
    assert torch.isfinite(1 / nothing).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_everywhere_and_stays(backend: str) -> None:
    x = values(2, 32)
    x[1, 3] = float("nan")
    with ck.use_backend(backend):
        assert scales_of(x).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_stops_where_values_were_clamped(backend: str) -> None:
    """A scale may be less than a sixth of the largest magnitude, by rounding to e4m3."""
    x = values(64, 64).requires_grad_()
    scale = torch.zeros(64, 4)
    with ck.use_backend(backend):
        y = ck.observe_and_fake_quantize(
            x, scale, block_size=(1, 16), scheme=Scheme.SYMMETRIC, scale_format=ScaleFormat.E4M3, **NVFP4
        )
        y.sum().backward()
    inside = (x.detach() / scale.repeat_interleave(16, 1)).abs() <= 6
    assert_same_bits(x.grad, inside.float())
    assert not inside.all()


def test_values_are_those_of_torchao() -> None:
    """torchao multiplies by the reciprocal where we divide: values halfway between two may differ."""
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = values(64, 256)
    of_tensor = nvfp4.per_tensor_amax_to_scale(x.abs().max())
    its_scales, packed = nvfp4.nvfp4_quantize(x, 16, of_tensor)
    scale = scales_of(x)
    assert_same_bits(its_scales.view(64, 16).float() * of_tensor, scale)
    bytes_ = packed.view(torch.uint8).view(64, 128)
    codes = torch.stack([bytes_ & 0xF, bytes_ >> 4], 2).view(64, 256).long()
    its_values = E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    ours = ck.quantize(x, scale, block_size=(1, 16), dtype=torch.float32, **NVFP4)
    assert (ours != its_values).float().mean() < 1e-3
    torch.testing.assert_close(ours, its_values, rtol=0.0, atol=2.0)


def test_integers_have_no_scales_of_two_levels() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="E4M3 needs a floating-point format; got INT"):
        ck.choose_qparams(
            -one,
            one,
            scheme=Scheme.SYMMETRIC,
            quant_min=-128.0,
            quant_max=127.0,
            scale_format=ScaleFormat.E4M3,
        )
