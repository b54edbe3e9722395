"""The Triton palette operations under Triton's interpreter, against the reference.

Not collected by itself: ``test_triton_interpreter.py`` runs it, with TRITON_INTERPRET set before anything
imports triton.
"""

import os

import pytest
import torch

import coreai_kernels as ck
from coreai_kernels.ops.kmeans_search import Problem
from tests.kernels.support import assert_same_bits, assert_same_memory_format

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Shape, block size, entries of a vector, clusters: whole tensors, groups of rows and of columns, odd sizes.
CASES = [
    ((20, 70), (20, 70), 1, 16),
    ((16, 33), (4, 33), 1, 5),
    ((6, 24), (6, 4), 1, 20),
    ((8, 3, 3, 3), (4, 3, 3, 3), 2, 8),
    ((9, 20), (9, 5), 3, 4),
    ((1300,), (1300,), 1, 1),
]
NAMES = ("shape", "block_size", "dim", "clusters")


def inputs(shape: tuple[int, ...], block_size: tuple[int, ...], dim: int, clusters: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(len(shape) + clusters)
    weight = torch.randn(shape, generator=generator)
    weight.view(-1)[:3] = torch.tensor([float("inf"), -0.0, 1e-41])
    blocks = weight.numel() // torch.Size(block_size).numel()
    centroids = torch.randint(-4, 5, (blocks, clusters, dim), generator=generator) / 2
    return weight.to(dtype), centroids.to(dtype)


@pytest.mark.parametrize(NAMES, CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_palettize_and_lookup(shape, block_size, dim, clusters, dtype) -> None:
    weight, centroids = inputs(shape, block_size, dim, clusters, dtype)
    weight.view(-1)[0] = float("nan")
    if len(shape) == 2 and dim == 1:
        weight = weight.t().contiguous().t()
    bits = max(1, (clusters - 1).bit_length())
    results = {}
    for backend in ("reference", "triton"):
        with ck.use_backend(backend):
            indices = ck.palettize(weight, centroids, block_size=block_size)
            found = ck.lookup(indices, centroids, block_size=block_size)
            extra = []
            if dim == 1:
                mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
                extra = [
                    ck.palettize(weight, centroids, block_size=block_size, decimals=1),
                    ck.lookup(indices, centroids, block_size=block_size, mask=mask),
                ]
            packed = ck.pack_bits(indices, bits)
            unpacked = ck.lookup_packed(packed, centroids, shape, block_size=block_size, bits=bits)
            results[backend] = [indices, found, unpacked, *extra]
    for got, wanted in zip(results["triton"], results["reference"], strict=True):
        assert_same_bits(got, wanted)
        assert_same_memory_format(got, wanted)


@pytest.mark.parametrize(NAMES, CASES)
def test_gradients(shape, block_size, dim, clusters) -> None:
    weight, centroids = inputs(shape, block_size, dim, clusters, torch.float32)
    weight.view(-1)[0] = 0.0
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    results = {}
    for backend in ("reference", "triton"):
        leaf, palette = weight.clone().requires_grad_(), centroids.clone().requires_grad_()
        with ck.use_backend(backend):
            indices = ck.palettize(weight, centroids, block_size=block_size)
            hard = ck.lookup(indices, palette, block_size=block_size, weight=leaf)
            soft = ck.soft_palettize(leaf, palette, 2.0, block_size=block_size, iterations=2)
            ((hard + soft) * upstream).sum().backward()
        results[backend] = [soft.detach(), leaf.grad, palette.grad]
    for got, wanted in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_parts_of_a_large_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from coreai_kernels.triton import palettes

    monkeypatch.setattr(palettes, "_PART", 512)
    upstream = torch.randn(40, 50)
    indices = torch.randint(0, 20, (40, 50), dtype=torch.uint8)
    results = []
    for backend in ("reference", "triton"):
        palette = torch.zeros(2, 20, 1, requires_grad=True)
        with ck.use_backend(backend):
            ck.lookup(indices, palette, block_size=(20, 50)).backward(upstream)
        results.append(palette.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tries", "blocks", "dim", "count", "clusters", "weighted"),
    [(2, 2, 2, 100, 5, True), (1, 1, 3, 70, 20, False), (1, 1, 1, 40, 4, False), (1, 1, 2, 1, 1, True)],
)
def test_lloyd(tries, blocks, dim, count, clusters, weighted, monkeypatch) -> None:
    """Several parts, empty clusters, equal centroids and exact ties; sums are float64 in another order."""
    from coreai_kernels.triton import lloyd

    monkeypatch.setattr(lloyd, "_TILE", 16)
    generator = torch.Generator().manual_seed(count)
    vectors = torch.randint(-40, 41, (blocks, dim, count), generator=generator) / 8
    start = torch.randint(-16, 17, (tries, blocks, clusters, dim), generator=generator) / 4
    start[..., -1, :] = start[..., 0, :]
    mass = torch.randint(0, 4, (blocks, count), generator=generator) / 2 if weighted else None
    problem = Problem.of(vectors, mass)
    for iterations, tolerance in ((0, 0.0), (3, -1.0), (9, 1e-2)):
        found = {}
        for backend in ("reference", "triton"):
            with ck.use_backend(backend):
                found[backend] = problem.lloyd(start, iterations, tolerance)
        for got, wanted in zip(found["triton"], found["reference"], strict=True):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
