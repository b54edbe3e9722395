"""fake_quantize_by_reciprocal: backends agree, the definition's gradient, and bad arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coreai_kernels as ck
from tests.kernels.reciprocal_support import KINDS, check_by_reciprocal, draw, run
from tests.kernels.support import assert_same_bits


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 40),
    runs=st.integers(1, 3),
    run=st.sampled_from([8, 16, 24, 40, 64, 136]),
    chooses=st.booleans(),
    is_symmetric=st.booleans(),
    bits=st.integers(2, 8),
    eps=st.sampled_from([1e-6, torch.finfo(torch.float32).smallest_normal]),
    seed=st.integers(0, 99),
)
def test_backends_agree(
    isa: str,
    kind: str,
    rows: int,
    runs: int,
    run: int,
    chooses: bool,
    is_symmetric: bool,
    bits: int,
    eps: float,
    seed: int,
) -> None:
    x, gradient = draw(kind, seed, rows, runs * run), draw(kind, seed + 1, rows, runs * run)
    check_by_reciprocal("native", x, gradient, chooses, bits, run=run, is_symmetric=is_symmetric, eps=eps)


def test_threads_share_the_work() -> None:
    x, gradient = draw("plain", 0, 1030, 64), draw("plain", 1, 1030, 64)
    options = {"run": 32, "is_symmetric": False, "quant_min": -8, "quant_max": 7, "eps": 1e-6}
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(run("auto", x, gradient, True, **options))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["plain", "ties", "zeros", "tiny"]),
    rows=st.integers(1, 40),
    run=st.sampled_from([8, 16, 24, 40, 136]),
    bits=st.integers(2, 16),
    seed=st.integers(0, 99),
)
def test_straight_through_is_torchs_fake_quantization(
    isa: str, kind: str, rows: int, run: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, generator=generator) * 0.1 + 1e-3
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    zero_point = torch.randint(low, high + 1, (rows,), dtype=torch.int32, generator=generator)
    gradient = draw("not finite", seed, rows, run)
    options = {"run": run, "chooses": False, "is_symmetric": True, "eps": 1.0, "straight_through": True}
    found = []
    for backend in ("torch", "native", "reference"):
        leaf = draw(kind, seed, rows, run).requires_grad_()
        if backend == "torch":
            output = torch.fake_quantize_per_channel_affine(leaf, scale, zero_point, 0, low, high)
        else:
            with ck.use_backend(backend):
                output = ck.fake_quantize_by_reciprocal(
                    leaf, scale, zero_point, quant_min=low, quant_max=high, **options
                )
        output.backward(gradient)
        found.append((output.detach(), leaf.grad))
    for each in found[1:]:
        for one, other in zip(found[0], each, strict=True):
            assert_same_bits(one, other)


def test_the_gradient_is_the_definitions() -> None:
    x = torch.linspace(-3, 3, 64).view(2, 32)
    scale, zero_point = torch.tensor([0.3, 0.1]), torch.tensor([1, -2], dtype=torch.int32)
    leaf = x.clone().requires_grad_()
    output = ck.fake_quantize_by_reciprocal(
        leaf,
        scale,
        zero_point,
        run=32,
        chooses=False,
        is_symmetric=False,
        quant_min=-8,
        quant_max=7,
        eps=1e-6,
    )
    gradient = draw("plain", 0, 2, 32)
    output.backward(gradient)
    factor = scale.view(2, 1)
    q = torch.round(x * (1 / factor)) + zero_point.view(2, 1)
    inside = (q >= -8) & (q <= 7)
    assert 0 < inside.sum() < inside.numel()
    assert_same_bits(leaf.grad, torch.where(inside, gradient * factor, 0.0) * (1 / factor))
    assert_same_bits(output.detach(), (q.clamp(-8, 7) - zero_point.view(2, 1)) * factor)


def test_a_gradient_of_a_changed_scale_is_refused() -> None:
    x = draw("plain", 0, 2, 16).requires_grad_()
    scale, zero_point = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    output = ck.fake_quantize_by_reciprocal(
        x, scale, zero_point, run=16, chooses=True, is_symmetric=True, quant_min=-8, quant_max=7, eps=1e-6
    )
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("error", "text", "changes"),
    [
        (TypeError, "input must be torch.float32; got torch.float64", {"input": torch.zeros(2, 16).double()}),
        (ValueError, "input must be contiguous", {"input": torch.zeros(16, 2).t()}),
        (TypeError, "zero_point must be torch.int32", {"zero_point": torch.zeros(2)}),
        (ValueError, "one value a block, that is 2; got 3 and 2", {"scale": torch.ones(3)}),
        (ValueError, "multiple of 8 that divides the last axis, 16; got 12", {"run": 12}),
        (ValueError, "multiple of 8 that divides the last axis, 16; got 32", {"run": 32}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, changes: dict[str, object]) -> None:
    arguments = {
        "input": torch.zeros(2, 16),
        "scale": torch.ones(2),
        "zero_point": torch.zeros(2, dtype=torch.int32),
        "run": 16,
        "chooses": True,
        "is_symmetric": True,
        "quant_min": -8,
        "quant_max": 7,
        "eps": 1e-6,
    } | changes
    with pytest.raises(error, match=text):
        ck.fake_quantize_by_reciprocal(**arguments)  # type: ignore[arg-type]
