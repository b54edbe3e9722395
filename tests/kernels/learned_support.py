"""Cases and checks for the operations that learn: masks drawn from logits, learned ranges."""

import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels.ops.library import implementation
from coreai_kernels.types import grid_shape
from tests.kernels.support import SPECIAL, assert_same_bits, assert_same_memory_format

# Shape, block of the range, memory format.
SHAPES = [
    ((), (), "contiguous"),
    ((0, 3), (1, 3), "contiguous"),
    ((1,), (1,), "contiguous"),
    ((67,), (67,), "contiguous"),
    ((5, 1031), (1, 1031), "contiguous"),
    ((5, 33), (5, 1), "contiguous"),
    ((7, 20), (1, 10), "transposed"),
    ((4, 6, 5, 3), (4, 1, 5, 3), "contiguous"),
    ((4, 6, 5, 3), (4, 1, 5, 3), "channels_last"),
    ((3, 8, 7), (3, 8, 7), "sliced"),
    ((3, 8, 7), (1, 8, 7), "expanded"),
    ((90, 101), (90, 101), "contiguous"),
]


def values(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int, special: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if special and x.numel() > len(SPECIAL):
        x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)
    x = x.to(dtype)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "expanded":
        return x[..., :1].expand(shape)
    return x


def run(backend: str, name: str, *args: object) -> object:
    with ck.use_backend(backend):  # type: ignore[arg-type]
        return implementation(name)(*args)


def check_sampled_mask(backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    weight, grad = (values(shape, layout, dtype, seed, special=True) for seed in (0, 1))
    logits = values(shape, "contiguous", torch.float32, 2, special=True) * 3
    draw = torch.tensor(2**33 + 5)
    for args, name in (
        ((weight, logits, draw, 2**40 + 3), "sampled_mask_forward"),
        ((grad, weight, logits, draw, 2**40 + 3), "sampled_mask_backward"),
    ):
        expected, actual = run("reference", name, *args), run(backend, name, *args)
        if isinstance(expected, Tensor):
            expected, actual = (expected,), (actual,)
        for mine, its in zip(actual, expected, strict=True):  # type: ignore[call-overload]
            assert_same_bits(mine, its, name)
            assert_same_memory_format(mine, its)


def range_arguments(
    shape: tuple[int, ...],
    block: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    has_low: bool,
    special: bool,
) -> tuple[object, ...]:
    x = values(shape, layout, dtype, 0, special)
    grad = values(shape, layout, dtype, 1)
    grid = grid_shape(torch.Size(shape), block)
    span = values(grid, "contiguous", torch.float32, 2).abs() + 0.3
    low = -values(grid, "contiguous", torch.float32, 3).abs() if has_low else None
    return grad, x, low, span, list(block), 0.0 if has_low else -8.0, 15.0 if has_low else 7.0


def check_learnable_range(
    backend: str,
    shape: tuple[int, ...],
    block: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    has_low: bool,
    special: bool = False,
) -> None:
    args = range_arguments(shape, block, layout, dtype, has_low, special)
    expected, actual = (run(each, "learnable_range_backward", *args) for each in ("reference", backend))
    assert_same_bits(actual[0], expected[0], "gradient to the input")
    assert_same_memory_format(actual[0], expected[0])
    # Sums: a few units in the last place of the sum of magnitudes.
    count = max(1, torch.Size(block).numel())
    for mine, its in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6 * count**0.5, equal_nan=True)
    again = run(backend, "learnable_range_backward", *args)
    for mine, its in zip(again, actual, strict=True):
        assert_same_bits(mine, its, "run again")
