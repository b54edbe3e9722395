"""Tensors that several threads share give the same bits as the reference, with any number of threads."""

from collections.abc import Iterator

import pytest
import torch

import coreai_kernels as ck
from coreai_kernels import RangeUpdate, Scheme
from coreai_kernels.types import grid_shape
from tests.kernels.support import assert_same_bits

# Odd sizes put the borders between threads, blocks and mask bytes in different places.
CASES = {
    "per tensor": ((1, 150_001), (1, 150_001)),
    "per tensor, short": ((40_000,), (40_000,)),
    "rows": ((701, 129), (1, 129)),
    "few long rows": ((3, 70_003), (1, 70_003)),
    "many tiny rows": ((30_011, 3), (1, 3)),
    "rows of one byte": ((12_007, 8), (1, 8)),
    "blocks of 32": ((257, 640), (1, 32)),
    "columns": ((513, 300), (513, 1)),
    "columns with a short run": ((64, 31, 3, 9), (64, 1, 3, 9)),
    "columns with a long run": ((5, 7, 40, 41), (5, 1, 40, 41)),
    "squares": ((300, 320), (30, 16)),
    "cubes": ((32, 33, 64), (4, 3, 8)),
    "activation blocks": ((3, 32, 37, 11), (1, 8, 1, 1)),
    "single elements": ((211, 190), (1, 1)),
    # More than a cache holds: what was observed last is quantized first.
    "large, per tensor": ((1, 1_100_011), (1, 1_100_011)),
    "large, columns": ((5_001, 120), (5_001, 1)),
    "large, squares": ((800, 768), (40, 32)),
    # More columns and rows than have their parameters looked up at once.
    "many columns": ((131, 1080), (131, 1)),
}


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, dtype: torch.dtype, threads: int) -> None:
    shape, block_size = CASES[name]
    grid = grid_shape(torch.Size(shape), block_size)
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(shape, generator=generator)
    x.view(-1)[:: x.numel() // 7] = float("nan")
    x, gradient = x.to(dtype), torch.randn(shape, generator=generator).to(dtype)
    results = {}
    for backend in ("reference", "auto"):
        state = {
            "scale": torch.zeros(grid),
            "zero_point": torch.zeros(grid, dtype=torch.int32),
            "minval": torch.zeros(grid),
            "running_min": torch.full(grid, -1.5, dtype=dtype),
            "running_max": torch.full(grid, 2.5, dtype=dtype),
        }
        leaf = x.clone().requires_grad_()
        with ck.use_backend(backend):
            y = ck.observe_and_fake_quantize(
                leaf,
                **state,
                block_size=block_size,
                scheme=Scheme.ASYMMETRIC,
                quant_min=-8,
                quant_max=7,
                update=RangeUpdate.MOVING_AVERAGE,
                has_running=True,
            )
            y.backward(gradient)
        results[backend] = {"output": y.detach(), "gradient": leaf.grad, **state}
    for what, wanted in results["reference"].items():
        assert_same_bits(results["auto"][what], wanted, what)


def test_the_number_of_threads_does_not_show() -> None:
    x = torch.randn(1000, 333)
    found = []
    before = torch.get_num_threads()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(ck.observe_range(x, block_size=(1000, 1)) + ck.observe_range(x, block_size=(1, 333)))
    torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
