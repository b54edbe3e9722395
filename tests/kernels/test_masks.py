"""Masks: the reference against definitions of its own, the native kernels against the reference, errors."""

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import native
from coreai_kernels.ops.library import implementation
from coreai_kernels.reference.block_mask import block_norms
from tests.kernels.mask_support import (
    CONTENTS,
    Weight,
    check_blocks,
    check_nm,
    check_product,
    check_slices,
    check_topk,
    weights,
)
from tests.kernels.support import DTYPES, assert_same_bits

many = settings(max_examples=60, deadline=None)
backends = pytest.mark.parametrize("backend", ["reference", "auto"])
NAN, INF = math.nan, math.inf


def divisors(size: int, draw: st.DataObject) -> int:
    return draw.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0] or [1]))


@many
@given(weights(), st.data())
def test_topk_agrees(weight: Weight, data: st.DataObject) -> None:
    numel = math.prod(weight.shape)
    keep = data.draw(st.sampled_from([0, 1, numel // 2, numel, data.draw(st.integers(0, numel))]))
    check_topk("auto", "cpu", [weight], min(keep, numel))


@many
@given(st.lists(weights(), min_size=2, max_size=4), st.floats(0, 1))
def test_topk_of_several_agrees(several: list[Weight], share: float) -> None:
    check_topk("auto", "cpu", several, int(share * sum(math.prod(weight.shape) for weight in several)))


@many
@given(weights(), st.integers(2, 32), st.data())
def test_nm_agrees(weight: Weight, m: int, data: st.DataObject) -> None:
    if not weight.shape:
        return
    axis = data.draw(st.integers(0, len(weight.shape) - 1))
    weight.shape = tuple(m * min(size, 9) if i == axis else size for i, size in enumerate(weight.shape))
    if math.prod(weight.shape) < 200_000:
        check_nm("auto", "cpu", weight, data.draw(st.integers(1, m - 1)), m, axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nm_of_every_size(dtype: torch.dtype) -> None:
    """Enough groups for full vectors of them, and some more; also where the mask is written over a copy."""
    choice = random.Random(0)
    for m in range(2, 33):
        for content, layout in (("normal", "contiguous"), ("ties", "sliced")):
            n = choice.randint(1, m - 1)
            check_nm("auto", "cpu", Weight((167, 5 * m), content, layout, dtype, seed=m), n, m, 1)
            check_nm("auto", "cpu", Weight((2 * m, 77), content, layout, dtype, seed=m), n, m, 0)


@pytest.mark.parametrize(
    "block_size", [(1, 1), (1, 2), (4, 4), (2, 3), (8, 16), (96, 48), (3, 64), (2, 192), (96, 1)]
)
@pytest.mark.parametrize("content", ["normal", "growing", "subnormal"])
def test_blocks_of_many_sizes(block_size: tuple[int, int], content: str) -> None:
    for shape in ((96, 192), (192, 1152)):
        blocks = math.prod(shape) // math.prod(block_size)
        for dtype in DTYPES[:3]:
            check_blocks("auto", "cpu", Weight(shape, content, "contiguous", dtype), blocks // 3, block_size)


@many
@given(weights(), st.data())
def test_blocks_agree(weight: Weight, data: st.DataObject) -> None:
    block_size = tuple(
        data.draw(st.sampled_from([1, size or 1, divisors(size, data)])) for size in weight.shape
    )
    blocks = math.prod(size // block for size, block in zip(weight.shape, block_size, strict=True))
    check_blocks("auto", "cpu", weight, data.draw(st.integers(0, blocks)), block_size)
    for axis, size in enumerate(weight.shape):
        check_slices("auto", "cpu", weight, size // 2, axis)


@many
@given(weights(), st.sampled_from(CONTENTS))
def test_products_agree(weight: Weight, content: str) -> None:
    for layout in ("contiguous", weight.layout):
        check_product("auto", "cpu", weight, Weight(weight.shape, content, layout, weight.dtype, seed=5))


# Above 2**17 elements threads share the work; odd sizes put their borders anywhere.
LARGE = [
    Weight((700, 701), "normal", "contiguous", torch.float32),
    Weight((700, 701), "ties", "contiguous", torch.bfloat16),
    Weight((3, 40, 41, 101), "normal", "channels_last", torch.float16),
    Weight((3, 40, 41, 101), "ties", "channels_last", torch.float32),
    Weight((401, 1001), "equal", "transposed", torch.float32),
    Weight((401, 1001), "nans", "contiguous", torch.float64),
    Weight((500_003,), "zeros", "contiguous", torch.float32),
    Weight((500_003,), "wide", "sliced", torch.bfloat16),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("weight", LARGE, ids=lambda w: f"{w.content}-{w.layout}-{w.dtype}")
def test_large_tensors(weight: Weight, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numel = math.prod(weight.shape)
        for keep in (numel // 2, numel // 10, numel - 1):
            check_topk("auto", "cpu", [weight], keep)
        for axis in range(len(weight.shape)):
            block_size = tuple(1 if i == axis else size for i, size in enumerate(weight.shape))
            check_blocks("auto", "cpu", weight, weight.shape[axis] // 2, block_size)
        check_blocks("auto", "cpu", weight, 1, weight.shape)
        check_product("auto", "cpu", weight, weight)
        if weight.shape[0] % 4 == 0:
            check_nm("auto", "cpu", weight, 2, 4, 0)
    finally:
        torch.set_num_threads(before)


def test_one_threshold_across_dtypes() -> None:
    several = [
        Weight((90, 91), content, layout, dtype, seed=i)
        for i, (content, layout, dtype) in enumerate(
            itertools.product(["normal", "special"], ["contiguous", "transposed"], DTYPES)
        )
    ]
    for last in (3, 5, 16):
        for keep in (1, 2_001, 8_000):
            check_topk("auto", "cpu", several[:last], keep)


@pytest.mark.skipif(native.extension is None, reason="needs the native extension")
def test_other_instruction_sets() -> None:
    """The instruction sets below the one in use: each in a process of its own, where the variable is read."""
    isas = native.extension.build_info()["cpu_isas"].split()
    lower = isas[: isas.index(native.extension.cpu_capability())]
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    for isa in lower:
        environment = os.environ | {"COREAI_CPU_CAPABILITY": isa, "PYTHONPATH": os.pathsep.join(paths)}
        result = subprocess.run(
            [sys.executable, "-c", "from tests.kernels.test_masks import sample; sample()"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{isa}: {result.stderr[-3000:]}"


def sample() -> None:
    """Some of everything, for a process that runs another instruction set."""
    choice = random.Random(7)
    layouts = itertools.cycle(["contiguous", "transposed", "channels_last"])
    for i, (content, dtype) in enumerate(itertools.product(CONTENTS, DTYPES)):
        layout = next(layouts)
        shape = choice.choice([(24, 96), (101,), (4, 12, 5, 7), (64, 33), (2, 3, 17, 4), (140, 150)])
        weight = Weight(shape, content, layout, dtype, seed=i)
        check_topk("native", "cpu", [weight], choice.randint(0, math.prod(shape)))
        check_product("native", "cpu", weight, weight)
        small = tuple(next(b for b in (4, 3, 2, 1) if length % b == 0) for length in shape)
        check_blocks("native", "cpu", weight, 1, small)
        for axis, size in enumerate(shape):
            block_size = tuple(1 if j == axis else length for j, length in enumerate(shape))
            check_blocks("native", "cpu", weight, size // 2, block_size)
            for m in (2, 3, 4, 5, 8, 12, 16, 32):
                if size % m == 0:
                    check_nm("native", "cpu", weight, choice.randint(1, m - 1), m, axis)
    for m, dtype in zip(range(2, 33), itertools.cycle(DTYPES), strict=False):
        weight = Weight((67, 5 * m), "ties", "contiguous", dtype, seed=m)
        check_nm("native", "cpu", weight, (m + 1) // 2, m, 1)
    for weight in LARGE[:3]:
        check_topk("native", "cpu", [weight], math.prod(weight.shape) // 3)


@backends
def test_ranks(backend: str) -> None:
    """NaN above infinity, -0.0 equal to 0.0, subnormals told apart, the lower index first."""
    x = torch.tensor([-0.0, 1e-45, 0.0, -INF, 2.0, NAN, -2.0, INF, -NAN, 3e-45])
    order = [5, 8, 3, 7, 4, 6, 9, 1, 0, 2]
    with ck.use_backend(backend):
        for keep in range(len(order) + 1):
            wanted = torch.zeros(10).index_fill(0, torch.tensor(order[:keep], dtype=torch.long), 1.0)
            assert torch.equal(ck.topk_mask(x, keep), wanted)
            if 0 < keep < 10:
                assert torch.equal(ck.nm_mask(x, keep, 10), wanted)
            columns = ck.channel_mask(x.expand(3, 10).contiguous(), keep, 1)
            assert torch.equal(columns, wanted.expand(3, 10))


@backends
def test_memory_format_does_not_show(backend: str) -> None:
    x = torch.randint(-3, 4, (3, 8, 5, 4)).float()
    with ck.use_backend(backend):
        for keep in (1, 100, 240):
            plain = ck.topk_mask(x, keep)
            permuted = ck.topk_mask(x.contiguous(memory_format=torch.channels_last), keep)
            assert permuted.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(plain, permuted)


@backends
@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (3, 8), (5, 7), (31, 32)])
def test_nm_keeps_n_of_every_m(backend: str, n: int, m: int) -> None:
    x = torch.randn(6, 4 * m)
    with ck.use_backend(backend):
        groups = ck.nm_mask(x, n, m).view(6, 4, m)
    assert torch.equal(groups.sum(-1), torch.full((6, 4), float(n)))
    kept = torch.where(groups == 1, x.view(6, 4, m).abs(), INF).amin(-1)
    dropped = torch.where(groups == 0, x.view(6, 4, m).abs(), 0.0).amax(-1)
    assert bool((kept >= dropped).all())


@backends
def test_norms_do_not_depend_on_the_order(backend: str) -> None:
    """Rows that are permutations of each other tie, so the first ones stay; plain sums would differ."""
    row = torch.randn(1000) * torch.exp2(8 * torch.randn(1000))
    x = torch.stack([row[torch.randperm(1000)] for _ in range(64)])
    assert len({float(sum(other)) for other in x.abs().double().tolist()}) > 1
    with ck.use_backend(backend):
        assert ck.channel_mask(x, 10)[:, 0].tolist() == [1.0] * 10 + [0.0] * 54
        assert ck.channel_mask(x.T, 10, axis=1)[0].tolist() == [1.0] * 10 + [0.0] * 54


def test_norms_are_those_of_float64() -> None:
    x = torch.randn(50, 4096)
    norms = block_norms(x, (1, 4096)).flatten()
    torch.testing.assert_close(norms, x.double().abs().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("content", ["normal", "wide", "growing"])
def test_norms_are_within_their_bound(content: str) -> None:
    x = Weight((64, 300), content, "contiguous", torch.float32, seed=3).tensor()
    norms, magnitudes = block_norms(x, (1, 300)).flatten(), x.double().abs()
    bound = 300 * 2.0**-25 * magnitudes.amax(1)
    assert bool(((norms - magnitudes.sum(1)).abs() <= bound).all())


@pytest.mark.parametrize("peak", [2.0**-140, 2.0**-99, 1.0, 15.999, 16.0, 2.0**127])
def test_unit_of_norms(peak: float) -> None:
    """Half a unit is rounded to even: to none, 1.5 units to two."""
    unit = 2.0 ** (4 * math.floor(math.log2(peak) / 4) + 4 - 28)
    x = torch.tensor([[peak, 0.5 * unit], [peak, 1.5 * unit]], dtype=torch.float64)
    norms = block_norms(x, (1, 2)).flatten() - peak
    rounded = round(peak / unit) * unit - peak
    assert norms.tolist() == [rounded, rounded + 2 * unit]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("backend", ["reference", "auto", "native"])
def test_product_and_its_gradient(dtype: torch.dtype, mask_dtype: torch.dtype | None, backend: str) -> None:
    x = torch.tensor([[1.5, NAN, -2.0], [INF, -0.0, 3.0]], dtype=dtype).requires_grad_()
    mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]], dtype=mask_dtype or dtype)
    gradient = torch.tensor([[1.0, 2.0, INF], [NAN, 5.0, -6.0]], dtype=dtype)
    with ck.use_backend(backend):
        y = ck.apply_mask(x, mask)
        y.backward(gradient)
    assert_same_bits(y.detach(), x.detach() * mask.to(dtype))
    assert_same_bits(x.grad, gradient * mask.to(dtype))
    assert mask.grad is None


def test_backward_keeps_the_mask_and_nothing_else() -> None:
    saved: list[Tensor] = []
    x, mask = torch.randn(64, 100).requires_grad_(), torch.ones(64, 100)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ck.apply_mask(x, mask)
    assert [t.data_ptr() for t in saved] == [mask.data_ptr()]


def test_masks_compile_without_a_graph_break() -> None:
    def masked(x: Tensor) -> Tensor:
        return ck.apply_mask(x, ck.topk_mask(x, 10) * ck.nm_mask(x, 2, 4) * ck.channel_mask(x, 3, 0))

    x = torch.randn(8, 16)
    assert_same_bits(torch.compile(masked, fullgraph=True)(x), masked(x))


@backends
def test_empty_tensors_and_scalars(backend: str) -> None:
    with ck.use_backend(backend):
        assert ck.topk_mask(torch.empty(0, 3), 0).shape == (0, 3)
        assert ck.nm_mask(torch.empty(0, 4), 2, 4).shape == (0, 4)
        assert ck.channel_mask(torch.empty(4, 0), 2).shape == (4, 0)
        assert ck.block_mask(torch.empty(0, 3), 0, (-1, 1)).shape == (0, 3)
        assert ck.topk_masks([], 0) == []
        assert [mask.shape for mask in ck.topk_masks([torch.empty(0), torch.ones(2)], 1)] == [(0,), (2,)]
        assert ck.topk_mask(torch.tensor(3.0), 1) == 1
        assert ck.block_mask(torch.tensor(3.0), 0, ()) == 0


def test_masks_are_fresh_tensors() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    for mask in (ck.topk_mask(x, 16), ck.nm_mask(x, 2, 4), ck.channel_mask(x, 4)):
        assert not mask.requires_grad
        assert mask.data_ptr() != x.data_ptr()


X, INTEGERS = torch.ones(4, 6), torch.ones(4, 6, dtype=torch.int32)
BAD: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "weight must be one of torch.float32", lambda: ck.topk_mask(INTEGERS, 1)),
    (TypeError, r"weights\[1\] must be one of", lambda: ck.topk_masks([X, INTEGERS], 1)),
    (TypeError, "weight must be one of", lambda: ck.nm_mask(INTEGERS, 1, 2)),
    (TypeError, "weight must be one of", lambda: ck.channel_mask(INTEGERS, 1)),
    (TypeError, "weight must be one of", lambda: ck.apply_mask(INTEGERS, X)),
    (ValueError, r"num_keep must lie in \[0, 24\].*got 25", lambda: ck.topk_mask(X, 25)),
    (ValueError, r"num_keep must lie in \[0, 24\].*got -1", lambda: ck.topk_mask(X, -1)),
    (ValueError, r"\[0, 48\].*48 elements; got 49", lambda: ck.topk_masks([X, X], 49)),
    (ValueError, "on one device", lambda: ck.topk_masks([X, X.to("meta")], 1)),
    (ValueError, "1 <= n < m <= 32; got n = 2, m = 2", lambda: ck.nm_mask(X, 2, 2)),
    (ValueError, "1 <= n < m <= 32; got n = 0, m = 2", lambda: ck.nm_mask(X, 0, 2)),
    (ValueError, "1 <= n < m <= 32; got n = 1, m = 33", lambda: ck.nm_mask(X, 1, 33)),
    (ValueError, r"m = 4 does not divide axis 1 of shape \(4, 6\)", lambda: ck.nm_mask(X, 2, 4)),
    (IndexError, "axis 2 is out of range", lambda: ck.nm_mask(X, 1, 2, 2)),
    (IndexError, "axis 0 is out of range", lambda: ck.channel_mask(torch.tensor(1.0), 1)),
    (IndexError, "axis -3 is out of range", lambda: ck.channel_mask(X, 1, -3)),
    (ValueError, r"\[0, 6\].*6 slices; got 7", lambda: ck.channel_mask(X, 7, 1)),
    (ValueError, "does not divide shape", lambda: ck.block_mask(X, 1, (3, 1))),
    (ValueError, "one entry per dimension", lambda: ck.block_mask(X, 1, (1,))),
    (ValueError, r"\[0, 4\].*4 blocks; got 5", lambda: ck.block_mask(X, 5, (1, -1))),
    (ValueError, r"weight's shape \(4, 6\); got \(6,\)", lambda: ck.apply_mask(X, torch.ones(6))),
    (ValueError, "weight's device cpu; got meta", lambda: ck.apply_mask(X, X.to("meta"))),
]


@pytest.mark.parametrize(("error", "text", "call"), BAD, ids=[text for _, text, _ in BAD])
def test_bad_arguments(error: type[Exception], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=text):
        call()


def test_nothing_waits_for_the_device() -> None:
    from tests.kernels.test_operators import NoHostReads

    x = torch.randn(8, 16)
    with ck.use_backend("reference"), NoHostReads():
        implementation("topk_masks")([x, x], 20)
        implementation("nm_mask")(x, 2, 4, 1)
        implementation("block_mask")(x, 3, [1, 16])
        implementation("apply_mask")(x, x)
