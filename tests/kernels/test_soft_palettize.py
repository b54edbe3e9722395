"""``soft_palettize`` and ``soft_centroids``: their definition in float64; every backend."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels.reference.layout import from_vectors, to_vectors
from tests.kernels.palette_support import PaletteCase, many, palette_cases
from tests.kernels.support import assert_same_memory_format

Results = list[Tensor]


def definition(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...], iterations: int
) -> tuple[Tensor, Tensor]:
    """The formulas, with the whole attention matrix: result and last centroids. Any dtype; differentiable."""
    vectors = to_vectors(weight, block_size, centroids.size(2))

    def attention() -> Tensor:
        distance = (vectors[:, :, None] - centroids[:, None]).square().sum(3)
        return torch.softmax(-distance / temperature, dim=2)

    for _ in range(iterations):
        a = attention()
        centroids = a.transpose(1, 2) @ vectors / a.sum(1).unsqueeze(2)
    return from_vectors(attention() @ centroids, weight.shape, block_size), centroids


def run(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: tuple[int, ...], iterations: int
) -> Results:
    """Result, moved centroids, and the gradients of a fixed linear function of both."""
    weight, centroids = weight.detach().requires_grad_(), centroids.detach().requires_grad_()
    kwargs = {"block_size": block_size, "iterations": iterations}
    out = ck.soft_palettize(weight, centroids, temperature, **kwargs)
    moved = ck.soft_centroids(weight, centroids, temperature, **kwargs)
    return [out.detach(), moved.detach(), *gradients(out, moved, weight, centroids)]


def gradients(out: Tensor, moved: Tensor, weight: Tensor, centroids: Tensor) -> Results:
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(out.shape, generator=generator).to(out.dtype)
    v = torch.randn(moved.shape, generator=generator).to(moved.dtype)
    ((out * u).double().sum() + (moved * v).double().sum()).backward()
    assert weight.grad is not None
    assert centroids.grad is not None
    return [weight.grad, centroids.grad]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(
    ("shape", "block_size", "dim", "clusters"),
    [
        ((16, 24), (16, 24), 1, 4),
        ((16, 24), (4, 24), 1, 16),
        ((16, 24), (16, 6), 1, 3),
        ((16, 25), (8, 25), 2, 5),
        ((12, 3, 3, 3), (6, 3, 3, 3), 3, 8),
        ((37,), (37,), 1, 1),
    ],
)
def test_against_float64_autograd(
    backend: str,
    iterations: int,
    shape: tuple[int, ...],
    block_size: tuple[int, ...],
    dim: int,
    clusters: int,
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator)
    blocks = weight.numel() // torch.Size(block_size).numel()
    centroids = torch.randn(blocks, clusters, dim, generator=generator)
    wide = [x.double().requires_grad_() for x in (weight, centroids)]
    out, moved = definition(*wide, 0.3, block_size, iterations)
    expected = [out.detach(), moved.detach(), *gradients(out, moved, *wide)]
    with ck.use_backend(backend):
        found = run(weight, centroids, 0.3, block_size, iterations)
    for got, wanted in zip(found, expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=1e-5 * scale)


@many
@given(palette_cases(max_clusters=33, special=False))
def test_backends_agree(case: PaletteCase) -> None:
    """All to 1e-4 of the largest value, or two steps of a 16-bit type.

    The temperature is as large as any squared value, so that gradients are of the order of what comes in, 1.
    """
    weight, centroids = case.tensor(), case.centroids()
    largest = max(float(x.abs().max()) if x.numel() else 0.0 for x in (weight, centroids)) + 1e-6
    results = []
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results.append(run(weight, centroids, largest**2, case.block_size, 1))
    assert_same_memory_format(results[1][0], results[0][0])
    for got, wanted, unit in zip(results[1], results[0], (largest, largest, 1.0, 1.0), strict=True):
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        if got.numel():
            step = 2 * torch.finfo(got.dtype).eps if got.dtype.itemsize == 2 else 1e-4
            scale = max(unit, float(wanted.abs().max()))
            torch.testing.assert_close(got.double(), wanted.double(), rtol=0.0, atol=step * scale)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_small_temperatures_are_hard_assignment(backend: str) -> None:
    weight, centroids = torch.randn(8, 32), torch.linspace(-2, 2, 8).reshape(1, 8, 1)
    with ck.use_backend(backend):
        hard = ck.lookup(ck.palettize(weight, centroids, block_size=(8, 32)), centroids, block_size=(8, 32))
        for temperature in (1e-6, 1e-30, 1e-44):
            soft = ck.soft_palettize(weight, centroids, temperature, block_size=(8, 32))
            torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_centroid_without_weights_stays(backend: str) -> None:
    weight = torch.randn(4, 4)
    centroids = torch.tensor([[[0.0], [1e6]]]).requires_grad_()
    with ck.use_backend(backend):
        moved = ck.soft_centroids(weight, centroids, 0.1, block_size=(4, 4))
        moved.sum().backward()
    assert float(moved.detach()[0, 1, 0]) == 1e6
    assert centroids.grad is not None
    assert float(centroids.grad[0, 1, 0]) == 1.0
    torch.testing.assert_close(moved.detach()[0, 0, 0], weight.mean())


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_stays_where_it_is(backend: str) -> None:
    weight = torch.randn(2, 40)
    clean = weight.clone()
    weight[0, 3] = float("nan")
    centroids = torch.randn(2, 4, 1)
    with ck.use_backend(backend):
        found = ck.soft_palettize(weight, centroids, 0.1, block_size=(1, 40))
        expected = ck.soft_palettize(clean, centroids, 0.1, block_size=(1, 40))
    assert bool(found[0, 3].isnan())
    assert int(found.isnan().sum()) == 1
    torch.testing.assert_close(found[1], expected[1])


def test_deterministic_for_any_number_of_threads() -> None:
    weight, centroids = torch.randn(400, 500), torch.randn(1, 16, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(weight, centroids, 0.1, (400, 500), 2))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_backward_keeps_only_what_was_given() -> None:
    """The weight and palettes: nothing of the size weights times clusters."""
    saved: list[int] = []
    weight, centroids = torch.randn(64, 64, requires_grad=True), torch.randn(1, 16, 1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ck.soft_palettize(weight, centroids, 0.1, block_size=(64, 64), iterations=2)
    assert max(saved) == weight.numel()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    weight, centroids = torch.randn(8, 6), torch.randn(2, 4, 1)

    def step(weight: Tensor, centroids: Tensor) -> Tensor:
        out = ck.soft_palettize(weight * 2, centroids, 0.5, block_size=(4, 6), iterations=1)
        return out.square().sum()

    results = []
    with ck.use_backend(backend):
        for function in (step, torch.compile(step, fullgraph=True)):
            leaves = [weight.clone().requires_grad_(), centroids.clone().requires_grad_()]
            function(*leaves).backward()
            results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    ops = torch.ops.coreai_kernels
    weight, centroids = torch.randn(8, 6, requires_grad=True), torch.randn(2, 4, 1, requires_grad=True)
    rest = (0.5, [4, 6])
    torch.library.opcheck(ops.soft_palettize.default, (weight, centroids, *rest))
    torch.library.opcheck(ops.soft_centroids.default, (weight, centroids, *rest))
    plain = (weight.detach(), centroids.detach(), *rest)
    torch.library.opcheck(ops.soft_palettize_backward.default, (torch.randn(8, 6), *plain))
    state = (torch.randn(2, 4, 1), torch.randn(2, 4, 1), torch.rand(2, 4))
    torch.library.opcheck(ops.soft_centroids_backward.default, (*state, *plain))


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("temperature must be above 0; got 0", {"temperature": 0.0}),
        ("temperature must be above 0; got nan", {"temperature": float("nan")}),
        ("iterations must be at least 0; got -1", {"iterations": -1}),
        ("one palette per block, 2", {"centroids": torch.ones(1, 4, 1)}),
    ],
)
def test_bad_arguments(text: str, arguments: dict[str, object]) -> None:
    call = {"weight": torch.randn(4, 8), "centroids": torch.randn(2, 4, 1), "temperature": 0.1}
    for function in (ck.soft_palettize, ck.soft_centroids):
        with pytest.raises(ValueError, match=text):
            function(**call | {"block_size": (2, 8)} | arguments)
