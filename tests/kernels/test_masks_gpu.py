"""Masks on a GPU: the reference's bits, CUDA graphs, no waiting, more than 2**31 elements."""

import itertools
import math

import pytest
import torch

import coreai_kernels as ck
from coreai_kernels import native
from tests.kernels.mask_support import (
    CONTENTS,
    Weight,
    check_blocks,
    check_nm,
    check_product,
    check_slices,
    check_topk,
)
from tests.kernels.support import DTYPES, assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [(7,), (24, 96), (4, 8, 3, 5), (700, 701), (64, 64, 3, 3), (2_000_003,)]


def test_the_cuda_library_is_there() -> None:
    assert native.cuda_missing is None, native.cuda_missing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("content", CONTENTS)
def test_topk(content: str, shape: tuple[int, ...]) -> None:
    for layout, dtype in itertools.product(["contiguous", "channels_last", "sliced"], DTYPES):
        weight = Weight(shape, content, layout, dtype, seed=len(shape))
        numel = math.prod(shape)
        for keep in {0, 1, numel // 4, numel // 2, numel - 1, numel}:
            check_topk("auto", "cuda", [weight], keep)


def test_one_threshold_across_dtypes() -> None:
    several = [
        Weight((300, 301), content, "contiguous", dtype, seed=i)
        for i, (content, dtype) in enumerate(itertools.product(CONTENTS, DTYPES))
    ]
    for last in (2, 4, 7, 32):
        for keep in (1, 30_001, 90_000):
            check_topk("auto", "cuda", several[:last], keep)


@pytest.mark.parametrize("content", CONTENTS)
def test_others(content: str) -> None:
    for layout, dtype in itertools.product(["contiguous", "channels_last", "transposed"], DTYPES):
        weight = Weight((16, 32, 3, 12), content, layout, dtype)
        for n, m, axis in ((2, 4, 1), (1, 4, 0), (2, 4, 3), (7, 12, 3), (5, 32, 1), (2, 3, 2)):
            check_nm("auto", "cuda", weight, n, m, axis)
        for block_size in ((1, 32, 3, 12), (16, 1, 3, 12), (16, 32, 3, 1), (2, 4, 1, 3), weight.shape):
            check_blocks("auto", "cuda", weight, 1, block_size)
        for axis, size in enumerate(weight.shape):
            check_slices("auto", "cuda", weight, size // 2, axis)
        matrix = Weight((512, 640), content, layout, dtype)
        check_nm("auto", "cuda", matrix, 2, 4, 1)
        check_blocks("auto", "cuda", matrix, 300, (1, 640))
        check_blocks("auto", "cuda", matrix, 300, (512, 1))
        check_product("auto", "cuda", weight, Weight(weight.shape, "special", "contiguous", dtype))


def test_nothing_waits_for_the_device() -> None:
    x = torch.randn(1000, 1000, device="cuda")
    for _ in range(2):  # the first time kernels are loaded
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            ck.topk_mask(x, 1000)
            ck.topk_masks([x, x.half()], 1000)
            ck.nm_mask(x, 2, 4)
            ck.channel_mask(x, 10)
            ck.apply_mask(x, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph() -> None:
    x = torch.randn(1000, 1000, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ck.topk_mask(x, 250_000)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = ck.topk_mask(x, 250_000)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_same_bits(mask, ck.topk_mask(x, 250_000))


def test_runs_agree() -> None:
    x = torch.randint(-2, 3, (3001, 1000), device="cuda").bfloat16()
    first = ck.topk_mask(x, 1_000_001)
    for _ in range(20):
        assert torch.equal(ck.topk_mask(x, 1_000_001), first)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40 << 30,
    reason="needs 40 GiB",
)
def test_more_elements_than_32_bits_count() -> None:
    numel = 2**31 + 4096
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    x[-10:] = 2.0
    x[::1_000_003] = 1.0
    ones = x[::1_000_003].numel()
    mask = ck.topk_mask(x, 10 + ones // 2)
    assert int(mask[-10:].sum()) == 10
    kept = mask[: numel - 10 : 1_000_003]
    assert int(kept.sum(dtype=torch.float64)) == ones // 2
    assert bool((kept[: ones // 2] == 1).all())
