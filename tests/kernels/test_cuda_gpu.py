"""Fake quantization in CUDA C++ on a GPU: the reference's bits, graphs, streams, more than 2**31 elements."""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, QuantConfig, RangeUpdate, Scheme
from coreai_kernels.reference.observe_and_fake_quantize import observe_and_fake_quantize as reference_step
from tests.kernels.support import assert_same_bits
from tests.kernels.test_triton_gpu import dtypes_for, huge, layouts  # noqa: F401  (a fixture)
from tests.kernels.triton_support import (
    KINDS,
    STEPS,
    Layout,
    check_fake_quantize,
    check_observe_range,
    check_quantize,
    check_step,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
INT4 = {"format": Format.INT, "quant_min": -8, "quant_max": 7}


@layouts
def test_fake_quantize(layout: Layout) -> None:
    for turn, kind in enumerate(KINDS):
        for dtype in dtypes_for(layout, turn):
            check_fake_quantize("auto", "cuda", layout, kind, dtype)


@layouts
def test_observe_range(layout: Layout) -> None:
    for dtype in dtypes_for(layout, 0):
        check_observe_range("auto", "cuda", layout, dtype)


@layouts
def test_quantize(layout: Layout) -> None:
    for turn, kind in enumerate(KINDS):
        for dtype in dtypes_for(layout, turn):
            check_quantize("auto", "cuda", layout, kind, dtype)


@layouts
def test_steps(layout: Layout) -> None:
    for turn, kind in enumerate(STEPS):
        for dtype in dtypes_for(layout, turn):
            check_step("auto", "cuda", layout, kind, dtype)


def step(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = ck.fake_quantize(x, scale, block_size=(1, x.shape[1]), **INT4)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), gradient


def test_cuda_graph() -> None:
    """A captured forward and backward, replayed on new data, give what eager ones give."""
    x = torch.zeros(512, 1024, device="cuda", requires_grad=True)
    scale = torch.rand(512, 1, device="cuda") + 0.1
    with torch.cuda.stream(torch.cuda.Stream()):
        step(x, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradient = step(x, scale)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, wanted in zip((y, gradient), step(x, scale), strict=True):
            assert_same_bits(got, wanted)


# One block of threads; several that hold the tensor and wait for each other; more than a GPU holds.
@pytest.mark.parametrize("numel", [9001, 20001, 1 << 22, 1 << 25])
def test_steps_of_whole_tensors(numel: int) -> None:
    layout = Layout("tensor", (numel,), (numel,))
    for kind in STEPS:
        check_step("auto", "cuda", layout, kind, torch.bfloat16)


def test_cuda_graph_of_a_step() -> None:
    """Also where blocks of threads wait for each other; a replay goes on from the range of the last."""
    config = QuantConfig((1 << 22,), Scheme.SYMMETRIC, *INT4.values(), update=RangeUpdate.MOVING_AVERAGE)
    call = torch.ops.coreai_kernels.observe_and_fake_quantize_
    x = torch.zeros(1 << 22, device="cuda")
    state = [torch.zeros(1, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.int32)]
    state += [torch.zeros(1, device="cuda") for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, mask = call(x, *state, True, config.packed(), True)
    low, high = torch.zeros(1), torch.zeros(1)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        wanted = reference_step(x.cpu(), low, high, config, True)
        low, high = wanted[-2:]
        for got, value in zip((y, mask, *state), wanted, strict=True):
            assert_same_bits(got.cpu(), value)


def test_the_current_stream_is_used() -> None:
    """On another stream a kernel comes after what was queued there before it."""
    scale = torch.full((64, 1), 0.5, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        x = torch.zeros(64, 1024, device="cuda")
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = ck.fake_quantize(x, scale, block_size=(1, 1024), **INT4)
    stream.synchronize()
    assert bool((y == 1).all())


@pytest.mark.parametrize("blocks", ["tensor", "rows"])
def test_more_than_32_bits(blocks: str, huge: Tensor) -> None:  # noqa: F811
    """Every repetition of the input gives the same output, the last as the first."""
    x = huge.view(-1, 4096)
    rows = 1 if blocks == "tensor" else x.shape[0]
    y = ck.fake_quantize(
        x, torch.full((rows, 1), 0.3, device="cuda"), block_size=(x.shape[0] // rows, 4096), **INT4
    )
    expected = ck.fake_quantize(x[0], torch.full((1,), 0.3, device="cuda"), block_size=(4096,), **INT4)
    assert bool((y.view(torch.int16) == expected.view(torch.int16)).all())
