"""Palettes on a GPU: the reference's bits, repeatable gradients, CUDA graphs, no waiting, 2**31 elements."""

import pytest
import torch
from torch import Tensor

import coreai_kernels as ck
from tests.kernels.support import DTYPES, assert_same_bits, assert_same_memory_format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICES = {"reference": "cpu", "triton": "cuda"}

# Shape, block size, entries of a vector, clusters.
CASES = [
    ((7,), (7,), 1, 3),
    ((24, 96), (24, 96), 1, 16),
    ((64, 515), (16, 515), 1, 16),
    ((40, 96), (40, 8), 1, 20),
    ((100, 201), (100, 201), 1, 256),
    ((96, 300), (8, 300), 2, 16),
    ((64, 8, 3, 3), (16, 8, 3, 3), 4, 64),
    ((27, 200), (27, 40), 9, 5),
]
cases = pytest.mark.parametrize(("shape", "block_size", "dim", "clusters"), CASES, ids=str)


def inputs(
    shape: tuple[int, ...], block_size: tuple[int, ...], dim: int, clusters: int
) -> tuple[Tensor, Tensor]:
    """A weight, and palettes with equal entries and exact ties."""
    generator = torch.Generator().manual_seed(len(shape) + clusters)
    weight = torch.randn(shape, generator=generator)
    blocks = weight.numel() // torch.Size(block_size).numel()
    centroids = torch.randint(-40, 41, (blocks, clusters, dim), generator=generator) / 16
    return weight, centroids


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_palettize_and_lookup(
    shape: tuple[int, ...], block_size: tuple[int, ...], dim: int, clusters: int, dtype: torch.dtype
) -> None:
    weight, centroids = (values.to(dtype) for values in inputs(shape, block_size, dim, clusters))
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-41], dtype=dtype)
    weight.view(-1)[:5] = special
    bits = max(1, (clusters - 1).bit_length())
    layouts = {"contiguous": weight, "transposed": weight.transpose(0, -1).contiguous().transpose(0, -1)}
    if weight.dim() == 4:
        layouts["channels_last"] = weight.contiguous(memory_format=torch.channels_last)
    for layout, values in layouts.items():
        results = {}
        for backend, device in DEVICES.items():
            palette = centroids.to(device)
            with ck.use_backend(backend):
                indices = ck.palettize(values.to(device), palette, block_size=block_size)
                found = ck.lookup(indices, palette, block_size=block_size)
                packed = ck.pack_bits(indices, bits)
                unpacked = ck.lookup_packed(packed, palette, shape, block_size=block_size, bits=bits)
            results[backend] = [part.cpu() for part in (indices, found, packed, unpacked)]
        for got, wanted in zip(results["triton"], results["reference"], strict=True):
            assert_same_bits(got, wanted, layout)
            assert_same_memory_format(got, wanted)


@cases
def test_gradients(shape: tuple[int, ...], block_size: tuple[int, ...], dim: int, clusters: int) -> None:
    weight, centroids = inputs(shape, block_size, dim, clusters)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def run(backend: str, device: str) -> list[Tensor]:
        leaf = weight.to(device).requires_grad_()
        palette = centroids.to(device).requires_grad_()
        with ck.use_backend(backend):
            indices = ck.palettize(leaf.detach(), palette.detach(), block_size=block_size)
            hard = ck.lookup(indices, palette, block_size=block_size, weight=leaf)
            soft = ck.soft_palettize(leaf, palette, 0.5, block_size=block_size, iterations=2)
            ((hard + soft) * upstream.to(device)).sum().backward()
        return [values.detach().cpu() for values in (soft, leaf.grad, palette.grad)]

    wanted, got = run("reference", "cpu"), run("triton", "cuda")
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    for one, other in zip(got, run("triton", "cuda"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_clusters_of_clumps(dim: int, weighted: bool) -> None:
    """Where the clusters are plain to see, devices agree up to the rounding of sums."""
    generator = torch.Generator().manual_seed(dim)
    points = torch.randn(3, 8, dim, generator=generator) * 10
    which = torch.randint(0, 8, (3, 400), generator=generator)
    vectors = points.gather(1, which[:, :, None].expand(-1, -1, dim))
    vectors = vectors + 0.01 * torch.randn(vectors.shape, generator=generator)
    weight = vectors.transpose(1, 2).reshape(3 * dim, 400)
    weights = torch.rand(weight.shape, generator=generator) if weighted else None
    found = {}
    for device in ("cpu", "cuda"):
        centroids = ck.kmeans(
            weight.to(device),
            8,
            cluster_dim=dim,
            block_size=(dim, 400),
            weights=None if weights is None else weights.to(device),
            restarts=8,
        )
        assert centroids.device.type == device
        order = centroids[:, :, :1].argsort(1).expand(-1, -1, dim)
        found[device] = centroids.gather(1, order).cpu()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-5, atol=1e-4)


def test_scalars_on_the_cpu_and_back() -> None:
    weight = torch.randn(64, 500)
    found = ck.kmeans_1d(weight.cuda(), 16, block_size=(16, 500))
    assert found.is_cuda
    assert torch.equal(found.cpu(), ck.kmeans_1d(weight, 16, block_size=(16, 500)))


def step(weight: Tensor, centroids: Tensor) -> Tensor:
    block_size = (16, weight.size(1))
    indices = ck.palettize(weight.detach(), centroids.detach(), block_size=block_size)
    hard = ck.lookup(indices, centroids, block_size=block_size, weight=weight)
    soft = ck.soft_palettize(weight, centroids, 0.1, block_size=block_size, iterations=1)
    loss = (hard + soft).square().sum()
    loss.backward()
    return loss.detach()


def test_nothing_waits_for_the_device() -> None:
    weight = torch.randn(64, 1000, device="cuda", requires_grad=True)
    centroids = torch.randn(4, 16, 1, device="cuda", requires_grad=True)
    for mode in ("default", "error"):  # the first time kernels are loaded
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(weight, centroids)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_in_a_cuda_graph() -> None:
    weight = torch.randn(64, 1000, device="cuda", requires_grad=True)
    centroids = torch.randn(4, 16, 1, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(weight, centroids)
    torch.cuda.current_stream().wait_stream(stream)
    weight.grad = centroids.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(weight, centroids)
    with torch.no_grad():
        weight.copy_(torch.randn(64, 1000))
    graph.replay()
    torch.cuda.synchronize()
    captured = [weight.grad.clone(), centroids.grad.clone()]
    weight.grad = centroids.grad = None
    step(weight, centroids)
    assert torch.equal(captured[0], weight.grad)
    assert torch.equal(captured[1], centroids.grad)


def test_more_than_two_to_the_31() -> None:
    rows, columns = 2**15 + 16, 2**16
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * rows * columns * 3:
        pytest.skip(f"needs {4 * rows * columns * 3 / 2**30:.0f} GiB of GPU memory")
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.float16)
    centroids = torch.linspace(-2, 2, 16, device="cuda").half()[None, :, None]
    indices = ck.palettize(weight, centroids, block_size=(rows, columns))
    found = ck.lookup(indices, centroids, block_size=(rows, columns))
    for part in (slice(0, 16), slice(rows - 16, rows)):
        wanted = ck.palettize(weight[part].cpu(), centroids.cpu(), block_size=(16, columns))
        assert torch.equal(indices[part].cpu(), wanted)
        assert torch.equal(found[part].cpu(), centroids.cpu().flatten()[wanted.long()])
