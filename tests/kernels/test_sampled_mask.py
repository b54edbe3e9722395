"""Masks drawn from logits."""

from collections.abc import Iterator

import pytest
import torch

import coreai_kernels as ck
from coreai_kernels.reference import sampled_mask as reference
from tests.kernels.learned_support import SHAPES, check_sampled_mask, run, values
from tests.kernels.support import assert_same_bits

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def words(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    return [int(word) for word in reference.philox([torch.tensor(c) for c in counter], key)]


def test_philox_gives_its_authors_numbers() -> None:
    # The known answers of Random123 for philox4x32-7.
    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words((ones,) * 4, (ones, ones)) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    assert words((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0x4DFCCABA,
        0x190A87F0,
        0xC47362BA,
        0xB6B5242A,
    ]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(("shape", "block", "layout"), SHAPES)
def test_native_agrees(shape: tuple[int, ...], block: object, layout: str, dtype: torch.dtype) -> None:
    check_sampled_mask("native", shape, layout, dtype)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_draw_the_same() -> None:
    check_sampled_mask("native", (300, 301), "contiguous", FP32)


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0]).repeat_interleave(40_000)
    kept = ck.sampled_mask(torch.ones_like(logits), logits, torch.tensor(1), seed=9)
    shares = kept.reshape(5, -1).mean(1)
    assert (shares - torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0]).sigmoid()).abs().max() < 0.01


def test_draws_seeds_and_neighbours_are_independent() -> None:
    logits = torch.zeros(40_000)
    masks = [
        ck.sampled_mask(torch.ones_like(logits), logits, torch.tensor(draw), seed=seed)
        for draw, seed in ((1, 0), (2, 0), (1, 1), (1, 1 << 32), (1 + (1 << 32), 0))
    ]
    masks += [masks[0].roll(shift) for shift in (1, 2, 3, 4)]
    correlations = torch.corrcoef(torch.stack(masks)) - torch.eye(len(masks))
    assert correlations.abs().max() < 0.03


def test_the_exponential_is_one() -> None:
    s = torch.linspace(-64, 64, 20_001)
    a, b = (each.double() for each in reference.logistic_terms(s, torch.full_like(s, 0.5)))
    exact = s.double().sigmoid()
    # As if the logit had been rounded, by a little more than half a step; and a few roundings more.
    assert ((a / (a + b) - exact) / exact / (s.double().abs() * 8e-8 + 3e-7)).abs().max() < 1


def test_extreme_logits_decide() -> None:
    logits = torch.tensor([float("inf"), 1e30, float("nan"), -1e30, -float("inf")]).repeat(100)
    kept = ck.sampled_mask(torch.ones_like(logits), logits, torch.tensor(1), seed=0)
    assert kept.reshape(100, 5).unique(dim=0).tolist() == [[1, 1, 0, 0, 0]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradient_is_that_of_the_definition(layout: str) -> None:
    weight = values((4, 5, 3, 3), layout, FP32, 0).requires_grad_()
    logits = values((4, 5, 3, 3), layout, FP32, 1).requires_grad_()
    grad = values((4, 5, 3, 3), "contiguous", FP32, 2)
    draw = torch.tensor(3)
    ck.sampled_mask(weight, logits, draw, seed=5).backward(grad)

    order = reference.memory_order(weight.detach())
    u = reference.from_memory_order(reference.uniform(weight.numel(), draw, 5), weight.shape, order).double()
    w, s = (x.detach().double().requires_grad_() for x in (weight, logits))
    p = (s + torch.log(u) - torch.log1p(-u)).sigmoid()
    straight = (p > 0.5) + p - p.detach()
    (w * straight).backward(grad.double())
    torch.testing.assert_close(weight.grad, w.grad.float())
    torch.testing.assert_close(logits.grad, s.grad.float(), rtol=1e-5, atol=1e-7)


def test_double_weights_are_computed_in_float32() -> None:
    weight = torch.randn(9, dtype=torch.float64)
    logits = torch.randn(9, dtype=torch.bfloat16)
    double = ck.sampled_mask(weight, logits, torch.tensor(1), seed=0)
    single = ck.sampled_mask(weight.float(), logits.float(), torch.tensor(1), seed=0)
    assert_same_bits(double, single.double())


def test_compiled_in_one_graph() -> None:
    weight, logits = torch.randn(33, requires_grad=True), torch.randn(33, requires_grad=True)
    draw = torch.tensor(2)

    def step(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return ck.sampled_mask(w, s, draw, seed=1) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, logits), step(weight, logits))
    mine = torch.autograd.grad(compiled(weight, logits).sum(), (weight, logits))
    its = torch.autograd.grad(step(weight, logits).sum(), (weight, logits))
    torch.testing.assert_close(mine, its)


def test_the_operators_are_well_formed() -> None:
    weight, logits, draw = (
        torch.randn(5, 3, requires_grad=True),
        torch.randn(5, 3, requires_grad=True),
        torch.tensor(1),
    )
    ops = torch.ops.coreai_kernels
    torch.library.opcheck(ops.sampled_mask.default, (weight, logits, draw, 7))
    plain = weight.detach(), logits.detach()
    torch.library.opcheck(ops.sampled_mask_forward.default, (*plain, draw, 7))
    torch.library.opcheck(ops.sampled_mask_backward.default, (torch.randn(5, 3), *plain, draw, 7))


def test_bad_arguments_are_named() -> None:
    weight, logits, draw = torch.randn(4), torch.randn(4), torch.tensor(1)
    with pytest.raises(TypeError, match="weight must be one of"):
        ck.sampled_mask(weight.int(), logits, draw, seed=0)
    with pytest.raises(ValueError, match=r"logits must have the weight's shape \(4,\)"):
        ck.sampled_mask(weight, torch.randn(3), draw, seed=0)
    with pytest.raises(TypeError, match="draw must be int64"):
        ck.sampled_mask(weight, logits, draw.float(), seed=0)
    with pytest.raises(ValueError, match="draw must have one element"):
        ck.sampled_mask(weight, logits, torch.tensor([1, 2]), seed=0)
    with pytest.raises(ValueError, match="seed must lie in"):
        ck.sampled_mask(weight, logits, draw, seed=-1)


def test_wrong_tensors_do_not_reach_the_native_kernel() -> None:
    with pytest.raises(RuntimeError, match="logits must be float32"):
        run("native", "sampled_mask_forward", torch.randn(3), torch.randn(3).double(), torch.tensor(1), 0)
