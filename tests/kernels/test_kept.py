"""Arguments that the native backend keeps: the results are those of the operator that gets them each time."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, Scheme, native
from coreai_kernels.ops import foreach
from coreai_kernels.ops.kept import keep, keep_single
from coreai_kernels.ops.library import implementation
from coreai_kernels.ops.observe_and_fake_quantize import packed

pytestmark = pytest.mark.skipif(native.missing is not None, reason=f"native backend: {native.missing}")

SHAPES = [(4, 8), (8,), (2, 3, 8), (4, 8), (0, 8)]
BLOCKS = [(1, 4), (8,), (1, 3, 8), (4, 2), (1, 8)]
STEP = (
    int(Scheme.SYMMETRIC),
    int(Format.INT),
    -8.0,
    7.0,
    False,
    int(RangeUpdate.LATEST),
    0.01,
    None,
    None,
    False,
)


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def state() -> list[tuple[Tensor | None, ...]]:
    rows = []
    for shape, block in zip(SHAPES, BLOCKS, strict=True):
        grid = ck.grid_shape(torch.Size(shape), block)
        rows.append((torch.ones(grid), torch.zeros(grid, dtype=torch.int32), torch.zeros(grid), None, None))
    return rows


def same(one: tuple[list[Tensor], Tensor], other: tuple[list[Tensor], Tensor]) -> bool:
    return all(map(torch.equal, one[0], other[0])) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["foreach_fake_quantize_forward", "foreach_observe_and_fake_quantize_"])
def test_results_are_those_of_the_operator(name: str, threads: int) -> None:
    rows, twins = state(), state()
    blocks = [tuple(block) for block in BLOCKS]

    def launch(rows):
        if name == "foreach_fake_quantize_forward":
            return foreach.launch([row[:2] + (None,) for row in rows], blocks, int(Format.INT), -8.0, 7.0)
        return foreach.launch_step(rows, False, blocks, STEP)

    kept = keep(name, launch(rows)._args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for inputs in (tensors(), [3 * x for x in tensors()], tensors(torch.bfloat16)):
            expected = implementation(name)(inputs, *launch(twins)._args, True)
            assert same(kept(inputs, True), expected)
            for row, twin in zip(rows, twins, strict=True):
                assert all(map(torch.equal, row[:3], twin[:3]))
    finally:
        torch.set_num_threads(before)


def test_a_guard_that_does_not_hold_gives_no_outputs() -> None:
    inputs, switches = tensors(), [torch.tensor([1], dtype=torch.uint8), torch.tensor(False)]
    launch = foreach.launch_step(state(), False, BLOCKS, STEP)
    assert launch.keep(inputs, switches)
    assert len(launch(inputs)) == len(inputs)
    switches[0].zero_()
    assert len(launch(inputs)) == 0
    switches[0].fill_(1)
    assert len(launch(inputs)) == len(inputs)
    assert len(launch([x.to(torch.bfloat16) for x in inputs])) == 0
    assert len(launch([x.unsqueeze(0) for x in inputs])) == 0
    with ck.use_backend("reference"):  # which asks nobody
        switches[0].zero_()
        assert len(launch(inputs)) == len(inputs)


def test_switches_of_other_kinds_are_not_kept() -> None:
    launch = foreach.launch_step(state(), False, BLOCKS, STEP)
    assert not launch.keep(tensors(), [torch.tensor([1])])
    assert len(launch(tensors())) == len(SHAPES)


def test_state_is_let_go_of_with_the_last_reference() -> None:
    rows = state()
    scale = rows[0][0]
    kept = keep("foreach_observe_and_fake_quantize_", foreach.launch_step(rows, False, BLOCKS, STEP)._args)
    number = kept._number
    del rows
    held = scale._use_count()
    del kept
    gc.collect()
    assert scale._use_count() < held
    with pytest.raises(RuntimeError, match=f"nothing is kept under number {number}"):
        torch.ops.coreai_kernels.run_kept(tensors(), number, False)


SINGLE = ("fake_quantize_forward", "observe_and_fake_quantize_")
needs_autograd = pytest.mark.skipif(native.autograd_missing is not None, reason=str(native.autograd_missing))


def single_args(name: str, shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[Any, ...]:
    grid = ck.grid_shape(torch.Size(shape), block)
    scale, zero_point = torch.full(grid, 0.1), torch.zeros(grid, dtype=torch.int32)
    if name == "fake_quantize_forward":
        return scale, zero_point, None, block, int(Format.INT), -8.0, 7.0
    return scale, zero_point, None, None, None, False, packed((block, *STEP))


@needs_autograd
@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((4, 8), (1, 4)), ((8,), (8,)), ((40, 24), (40, 1)), ((), ()), ((6, 5, 8), (3, 5, 2))],
)
def test_a_kept_call_is_the_operator(name, dtype, shape, block):
    x = torch.randn(shape).to(dtype).requires_grad_()
    args, own = single_args(name, shape, block), single_args(name, shape, block)
    call = keep_single(name, x, own, [], [])
    assert call is not None
    wanted, _ = implementation(name)(x, *args, True)
    found = call(x)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(own[:2], args[:2], strict=True))
    grad = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (found, wanted)))


@needs_autograd
@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(
    "input",
    [
        torch.randn(4, 8, dtype=torch.float64),
        torch.randn(4, 16)[:, ::2],
        torch.randn(8, 4).t(),  # blocks in another order than their parameters
        torch.randn(4, 8).to("meta"),
        torch.randn(0, 8),
        torch.randn(4, 1).expand(4, 8),
    ],
    ids=["double", "strided", "transposed", "meta", "empty", "expanded"],
)
def test_calls_that_cannot_be_kept(name, input):
    block = (2, 4) if input.numel() else (1, 8)
    assert keep_single(name, input, single_args(name, tuple(input.shape), block), [], []) is None


@needs_autograd
@pytest.mark.parametrize("name", SINGLE)
def test_a_kept_call_declines(name):
    x = torch.randn(4, 8)
    args = single_args(name, (4, 8), (1, 8))
    place, switch = {"scale": args[0], "none": None}, torch.tensor([1], dtype=torch.uint8)
    call = keep_single(name, x, args, [(place, "scale"), (place, "none"), (place, "absent")], [switch])
    assert call is not None
    assert call(x) is not None
    for other in (x.double(), x[:2], x.t(), x.to("meta"), x.to_sparse(), x.numpy(), None):
        assert call(other) is None
    switch.zero_()
    assert call(x) is None
    switch.fill_(1)
    place["none"] = args[0]
    assert call(x) is None
    place["none"] = None
    place["scale"] = args[0].clone()
    assert call(x) is None
    place["scale"] = args[0]
    assert call(x) is not None
    args[0].data = args[0].clone()
    assert call(x) is None


@needs_autograd
def test_a_kept_call_is_given_what_the_operator_takes():
    name = "observe_and_fake_quantize_"
    x = torch.randn(4, 8)
    args = single_args(name, (4, 8), (1, 8))
    with pytest.raises(RuntimeError, match="settings must be"):
        keep_single(name, x, (*args[:-1], args[-1][1:]), [], [])
    with pytest.raises(RuntimeError, match="scale must have one value per block"):
        keep_single(name, x, (args[0][:2], *args[1:]), [], [])
    assert keep_single(name, x, (args[0].double(), *args[1:]), [], []) is None
