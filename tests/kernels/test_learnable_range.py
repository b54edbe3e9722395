"""Quantization to ranges that get a gradient."""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels.types import grid_shape
from tests.kernels.learned_support import SHAPES, check_learnable_range, range_arguments, values

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64])
@pytest.mark.parametrize("has_low", [True, False], ids=["low", "symmetric"])
@pytest.mark.parametrize(("shape", "block", "layout"), SHAPES)
def test_native_agrees(
    shape: tuple[int, ...], block: tuple[int, ...], layout: str, has_low: bool, dtype: torch.dtype
) -> None:
    check_learnable_range("native", shape, block, layout, dtype, has_low)


@pytest.mark.parametrize("has_low", [True, False], ids=["low", "symmetric"])
def test_special_values(has_low: bool) -> None:
    check_learnable_range("native", (90, 101), (1, 101), "contiguous", FP32, has_low, special=True)


def test_the_sums_do_not_depend_on_the_number_of_threads() -> None:
    grad, x = torch.randn(700, 301), torch.randn(700, 301)
    args = (grad, x, None, torch.tensor([[1.5]]), [700, 301], -8.0, 7.0)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.ops.coreai_kernels.learnable_range_backward(*args))
    torch.set_num_threads(before)
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)


def defined(
    x: Tensor, low: Tensor | None, span: Tensor, block: tuple[int, ...], level_low: float, level_high: float
) -> Tensor:
    """The definition, differentiable: rounding passes the gradient on."""
    spread = [size for g in zip(span.shape, block, strict=True) for size in g]
    wide = [value.reshape([n for g in span.shape for n in (g, 1)]).expand(spread).reshape(x.shape)
            for value in ((span, low) if low is not None else (span,))]  # fmt: skip
    step = wide[0] / level_high
    offset = wide[1] if low is not None else 0.0
    position = (x - offset) / step
    q = (position + (position.round() - position).detach()).clamp(level_low, level_high)
    return q * step + offset


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("has_low", [True, False], ids=["low", "symmetric"])
@pytest.mark.parametrize(("shape", "block"), [((6, 50), (6, 50)), ((6, 50), (1, 50)), ((4, 3, 5), (4, 1, 5))])
def test_the_gradient_is_that_of_the_definition(
    shape: tuple[int, ...], block: tuple[int, ...], has_low: bool, backend: str
) -> None:
    grad, x, low, span, _, level_low, level_high = range_arguments(
        shape, block, "contiguous", FP32, has_low, special=False
    )
    leaves = [None if each is None else each.clone().requires_grad_() for each in (x, span, low)]
    exact = [None if each is None else each.double().requires_grad_() for each in (x, span, low)]
    with ck.use_backend(backend):  # type: ignore[arg-type]
        output = ck.learnable_range(
            leaves[0], leaves[1], leaves[2], block_size=block, level_low=level_low, level_high=level_high
        )
        output.backward(grad)
    expected = defined(exact[0], exact[2], exact[1], block, level_low, level_high)
    expected.backward(grad.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, its in zip(leaves, exact, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), its.grad, rtol=1e-4, atol=1e-4)
    assert bool((leaves[1].grad != 0).all())


def test_the_symmetric_scale_divides_by_the_scale() -> None:
    # One element inside: y = round(x * 7 / scale) * scale / 7, whose derivative is (y - x) / scale.
    x = torch.tensor([0.4])
    span = torch.tensor([1.0], requires_grad=True)
    y = ck.learnable_range(x, span, block_size=(1,), level_low=-8, level_high=7)
    y.sum().backward()
    torch.testing.assert_close(span.grad, y.detach() - x)
    for value, slope in ((5.0, 1.0), (-5.0, -8 / 7)):
        span = torch.tensor([1.0], requires_grad=True)
        ck.learnable_range(
            torch.tensor([value]), span, block_size=(1,), level_low=-8, level_high=7
        ).backward()
        torch.testing.assert_close(span.grad, torch.tensor([slope]))


def test_the_forward_is_fake_quantize() -> None:
    x = torch.randn(5, 40)
    span, low = torch.rand(5, 1) + 0.5, -torch.rand(5, 1)
    ranged = ck.learnable_range(x, span, low, block_size=(1, 40), level_low=0, level_high=15)
    plain = ck.fake_quantize(x, span / 15, None, low, block_size=(1, 40), quant_min=0, quant_max=15)
    assert torch.equal(ranged, plain)


def test_compiled_in_one_graph() -> None:
    x, span = torch.randn(4, 9, requires_grad=True), torch.rand(4, 1).add(0.5).requires_grad_()

    def step(x: Tensor, span: Tensor) -> Tensor:
        return ck.learnable_range(x, span, block_size=(1, 9), level_low=-8, level_high=7) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, span), step(x, span))
    mine = torch.autograd.grad(compiled(x, span).square().sum(), (x, span))
    its = torch.autograd.grad(step(x, span).square().sum(), (x, span))
    torch.testing.assert_close(mine, its)


def test_the_operator_is_well_formed() -> None:
    for has_low in (True, False):
        args = range_arguments((4, 9), (1, 9), "contiguous", FP32, has_low, special=False)
        torch.library.opcheck(torch.ops.coreai_kernels.learnable_range_backward.default, args)


def test_bad_arguments_are_named() -> None:
    x, span = torch.randn(4, 6), torch.ones(4, 1)
    levels = {"level_low": -8, "level_high": 7}
    with pytest.raises(TypeError, match="range must be float32"):
        ck.learnable_range(x, span.double(), block_size=(1, 6), **levels)
    with pytest.raises(ValueError, match="one value per block"):
        ck.learnable_range(x, span, block_size=(4, 6), **levels)
    with pytest.raises(ValueError, match="level_low must be 0 where low is given"):
        ck.learnable_range(x, span, span, block_size=(1, 6), **levels)
    with pytest.raises(ValueError, match="level_low <= 0 < level_high"):
        ck.learnable_range(x, span, block_size=(1, 6), level_low=1, level_high=7)
    with pytest.raises(ValueError, match="low must have the shape of range"):
        ck.learnable_range(x, span, span[:2], block_size=(1, 6), level_low=0, level_high=7)


def test_shapes_cover_all_geometries() -> None:
    grids = {grid_shape(torch.Size(shape), block) for shape, block, _ in SHAPES}
    assert len(grids) > 5
    assert values((2, 3), "transposed", FP32, 0).stride() == (1, 2)
