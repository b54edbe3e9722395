"""The Triton operators on a GPU: the reference's bits, CUDA graphs, no waiting, more than 2**31 elements."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, Scheme
from tests.kernels.gptq_support import KINDS as GPTQ_KINDS
from tests.kernels.gptq_support import SIZES, check_gptq_columns
from tests.kernels.reciprocal_support import KINDS as RECIPROCAL_KINDS
from tests.kernels.reciprocal_support import check_by_reciprocal
from tests.kernels.reciprocal_support import draw as draw_for_reciprocal
from tests.kernels.support import assert_same_bits
from tests.kernels.triton_support import (
    DTYPES,
    KINDS,
    LAYOUTS,
    STEPS,
    Layout,
    check_fake_quantize,
    check_foreach_fake_quantize,
    check_foreach_step,
    check_observe_range,
    check_quantize,
    check_step,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LARGE = [
    Layout("tensor", (1024, 1031), (1024, 1031), specials=False),
    Layout("tensor_even", (4096, 2048), (4096, 2048), specials=False),
    Layout("rows", (512, 4096), (1, 4096)),
    Layout("rows_20000", (48, 20000), (1, 20000)),
    Layout("rows_32768", (40, 32768), (1, 32768)),
    Layout("rows_100000", (12, 100000), (1, 100000)),
    Layout("rows_odd", (64, 147, 7), (1, 147, 7)),
    Layout("runs_32", (1024, 2048), (1, 32)),
    Layout("columns", (2048, 1024), (2048, 1)),
    Layout("columns_tall", (20000, 40), (20000, 1)),
    Layout("columns_of_32", (1024, 1056), (32, 1)),
    Layout("blocks_2d", (1024, 1024), (32, 32)),
    Layout("channels_nchw", (8, 64, 56, 56), (8, 1, 56, 56)),
    Layout("channels_last", (8, 64, 28, 28), (8, 1, 28, 28), "channels_last"),
    Layout("blocks_conv", (64, 64, 3, 3), (32, 32, 1, 1)),
]


layouts = pytest.mark.parametrize(
    "layout", [pytest.param(layout, id=f"{layout.name}-{layout.shape}") for layout in [*LAYOUTS, *LARGE]]
)


def dtypes_for(layout: Layout, turn: int) -> list[torch.dtype]:
    """All dtypes; for large tensors, on which the reference takes its time, they take turns."""
    large = torch.Size(layout.shape).numel() > 1 << 17
    return [DTYPES[(turn + LARGE.index(layout)) % len(DTYPES)]] if large else DTYPES


@layouts
def test_fake_quantize(layout: Layout) -> None:
    for turn, kind in enumerate(KINDS):
        for dtype in dtypes_for(layout, turn):
            check_fake_quantize("triton", "cuda", layout, kind, dtype)


@layouts
def test_quantize_and_dequantize(layout: Layout) -> None:
    for turn, kind in enumerate(KINDS):
        for dtype in dtypes_for(layout, turn):
            check_quantize("triton", "cuda", layout, kind, dtype)


@layouts
def test_observe_range(layout: Layout) -> None:
    for dtype in DTYPES:
        check_observe_range("triton", "cuda", layout, dtype)


@layouts
def test_observe_and_fake_quantize(layout: Layout) -> None:
    for turn, step in enumerate(STEPS):
        for dtype in dtypes_for(layout, turn):
            check_step("triton", "cuda", layout, step, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_foreach(dtype: torch.dtype) -> None:
    for kind in KINDS:
        check_foreach_fake_quantize("triton", "cuda", [*LAYOUTS, *LARGE], kind, dtype)
    for step in STEPS:
        check_foreach_step("triton", "cuda", [*LAYOUTS, *LARGE], step, dtype)


@pytest.mark.parametrize("format", list(Format), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern(format: Format, dtype: torch.dtype) -> None:
    """All values of the 16-bit types; for float32, each as the upper half of a value."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = (
        (patterns << 16).view(torch.float32)
        if dtype == torch.float32
        else patterns.to(torch.int16).view(dtype)
    )
    largest = {Format.INT: 7.0, Format.E4M3: 448.0, Format.E5M2: 57344.0, Format.E2M1: 6.0}[format]
    for scale in (1.0, 0.3, 1e-38, 3e38):
        results = {}
        for backend, device in (("reference", "cpu"), ("triton", "cuda")):
            with ck.use_backend(backend):
                results[backend] = ck.fake_quantize(
                    x.to(device),
                    torch.tensor([scale], device=device),
                    block_size=(2**16,),
                    format=format,
                    quant_min=-largest,
                    quant_max=largest,
                ).cpu()
        assert_same_bits(results["triton"], results["reference"], f"scale {scale}")


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits(bits: int) -> None:
    values = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8)
    with ck.use_backend("reference"):
        wanted = ck.pack_bits(values, bits)
        back = ck.unpack_bits(wanted, bits, values.numel(), signed=True)
    with ck.use_backend("triton"):
        packed = ck.pack_bits(values.cuda(), bits)
        assert torch.equal(packed.cpu(), wanted)
        assert torch.equal(ck.unpack_bits(packed, bits, values.numel(), signed=True).cpu(), back)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Fails on anything that makes the host wait for the device."""
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def training_step(
    x: Tensor, block_size: tuple[int, ...]
) -> tuple[Callable[[], tuple[Tensor, Tensor]], Tensor]:
    """A fake quantizer's forward and backward on tensors that stay in place; also its running minimum."""
    grid = [size // block for size, block in zip(x.shape, block_size, strict=True)]
    state = {
        "scale": torch.zeros(grid, device="cuda"),
        "zero_point": torch.zeros(grid, dtype=torch.int32, device="cuda"),
        "running_min": torch.zeros(grid, dtype=x.dtype, device="cuda"),
        "running_max": torch.zeros(grid, dtype=x.dtype, device="cuda"),
    }
    gradient = torch.ones_like(x)

    def run() -> tuple[Tensor, Tensor]:
        y = ck.observe_and_fake_quantize(
            x,
            **state,
            block_size=block_size,
            scheme=Scheme.ASYMMETRIC,
            quant_min=0,
            quant_max=255,
            update=RangeUpdate.MOVING_AVERAGE,
            has_running=True,
        )
        (dx,) = torch.autograd.grad(y, x, gradient)
        return y.detach(), dx

    return run, state["running_min"]


GRANULARITIES = {"tensor": (512, 1024), "rows": (1, 1024), "columns": (512, 1), "runs_32": (1, 32)}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_waits(granularity: str, no_waiting: None) -> None:
    x = torch.zeros(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with ck.use_backend("triton"):
        run, _ = training_step(x, GRANULARITIES[granularity])
        run()
        run()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_cuda_graph(granularity: str) -> None:
    """A captured step replayed on new data gives what eager steps give."""
    batches = [torch.randn(512, 1024, device="cuda") for _ in range(4)]
    with ck.use_backend("triton"):
        x = torch.zeros(512, 1024, device="cuda", requires_grad=True)
        run, running_min = training_step(x, GRANULARITIES[granularity])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dx = run()
        running_min.zero_()
        eager_x = torch.zeros(512, 1024, device="cuda", requires_grad=True)
        eager_run, eager_min = training_step(eager_x, GRANULARITIES[granularity])
        # The captured step's running maximum has seen the zeros of the warm-up, which leave it zero.
        for batch in batches:
            with torch.no_grad():
                x.copy_(batch)
                eager_x.copy_(batch)
            graph.replay()
            eager_y, eager_dx = eager_run()
            assert_same_bits(y, eager_y, "output")
            assert_same_bits(dx, eager_dx, "gradient")
            assert_same_bits(running_min, eager_min, "running minimum")


HUGE = 2**31 + 4096


@pytest.fixture
def huge() -> Iterator[Tensor]:
    """More than 2**31 bf16 values, which repeat."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    tile = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    yield tile.repeat(HUGE // 4096)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("blocks", ["tensor", "rows"])
def test_more_than_32_bits(blocks: str, huge: Tensor) -> None:
    """Every repetition of the input gives the same output and the same mask, the last as the first."""
    shape = (HUGE // 4096, 4096)
    x = huge.view(shape)
    block_size = shape if blocks == "tensor" else (1, 4096)
    grid = (1, 1) if blocks == "tensor" else (shape[0], 1)
    config = {"format": Format.INT, "quant_min": -8, "quant_max": 7}
    scale = torch.zeros(grid, device="cuda")
    with ck.use_backend("triton"):
        low, high = ck.observe_range(x, block_size=block_size)
        y = ck.observe_and_fake_quantize(x, scale, block_size=block_size, scheme=Scheme.SYMMETRIC, **config)
        assert bool((scale == scale.view(-1)[0]).all())
        expected = ck.fake_quantize(x[0], scale.view(-1)[:1].clone(), block_size=(4096,), **config)
        assert bool((y.view(torch.int16) == expected.view(torch.int16)).all())
        assert bool((low == x[0].min()).all())
        assert bool((high == x[0].max()).all())
        del y
        again = ck.fake_quantize(x, scale, block_size=block_size, **config)
        assert bool((again.view(torch.int16) == expected.view(torch.int16)).all())


def test_more_than_32_bits_in_columns_and_bytes(huge: Tensor) -> None:
    x = huge.view(HUGE // 4096, 4096)
    scale = torch.rand(1, 4096, device="cuda") + 0.1
    config = {"format": Format.INT, "quant_min": 0, "quant_max": 255}
    zero_point = torch.full((1, 4096), 128, dtype=torch.int32, device="cuda")
    block_size = (x.shape[0], 1)
    with ck.use_backend("triton"):
        q = ck.quantize(x, scale, zero_point, block_size=block_size, dtype=torch.uint8, **config)
        first = ck.quantize(x[:1], scale, zero_point, block_size=(1, 1), dtype=torch.uint8, **config)
        assert bool((q == first).all())
        packed = ck.pack_bits(q & 15, 4)
        assert bool((packed.view(-1, 2048) == packed[:2048]).all())
        unpacked = ck.unpack_bits(packed, 4, q.numel())
        assert bool((unpacked.view(-1, 4096) == (first & 15)).all())


@pytest.mark.parametrize("kind", GPTQ_KINDS)
@pytest.mark.parametrize(("n", "rows", "groups"), [*SIZES, (256, 5000, 2)])
def test_gptq_columns(n: int, rows: int, groups: int, kind: str) -> None:
    check_gptq_columns("triton", n, rows, groups, kind, device="cuda")


@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("kind", RECIPROCAL_KINDS)
def test_by_reciprocal(kind: str, chooses: bool) -> None:
    x, gradient = (draw_for_reciprocal(kind, seed, 500, 4096) for seed in (0, 1))
    for run in (32, 4096):
        options = {"run": run, "is_symmetric": False, "eps": 1e-6}
        check_by_reciprocal("triton", x, gradient, chooses, 8, device="cuda", **options)
