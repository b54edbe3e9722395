"""Arguments that the native backend keeps: the results are those of the operator that gets them each time."""

import gc

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, Scheme, native
from coreai_kernels.ops import foreach
from coreai_kernels.ops.kept import keep
from coreai_kernels.ops.library import implementation

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
