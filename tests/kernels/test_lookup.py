"""``lookup`` and ``lookup_packed``: weights from a palette, and their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck
from tests.kernels.palette_support import PaletteCase, many, palette_cases
from tests.kernels.support import assert_same_bits, assert_same_memory_format


@many
@given(palette_cases())
def test_backends_agree(case: PaletteCase) -> None:
    indices, centroids = case.indices(), case.centroids()
    bits = max(1, (case.clusters - 1).bit_length())
    packed = ck.pack_bits(indices, bits)
    results = {}
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            found = ck.lookup(indices, centroids, block_size=case.block_size)
            unpacked = ck.lookup_packed(
                packed, centroids, case.weight.shape, block_size=case.block_size, bits=bits
            )
        assert found.shape == torch.Size(case.weight.shape)
        assert unpacked.is_contiguous()
        assert_same_bits(unpacked, found, "packed")
        results[backend] = found
    assert_same_bits(results["auto"], results["reference"])
    assert_same_memory_format(results["auto"], results["reference"])


@many
@given(palette_cases(), st.booleans())
def test_masked_backends_agree(case: PaletteCase, transposed: bool) -> None:
    """Zeros where the mask is False, with the sign of what was looked up; whatever the mask's strides."""
    indices, centroids = case.indices(), case.centroids()
    mask = torch.rand(indices.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    if transposed and mask.dim() > 1:
        mask = mask.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            if case.dim > 1:
                with pytest.raises(ValueError, match=r"mask is for scalars"):
                    ck.lookup(indices, centroids, block_size=case.block_size, mask=mask)
                continue
            found = ck.lookup(indices, centroids, block_size=case.block_size, mask=mask)
            whole = ck.lookup(indices, centroids, block_size=case.block_size)
        assert_same_bits(found[mask], whole[mask])
        assert not found[~mask].any()
        assert torch.equal(found[~mask].signbit(), whole[~mask].signbit())
        results.append(found)
    if results:
        assert_same_bits(*results)
        assert_same_memory_format(*results)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compiles", [False, True])
def test_masked_gradients(backend: str, compiles: bool) -> None:
    indices = torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.uint8)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    weight, centroids = torch.zeros(2, 3, requires_grad=True), torch.ones(1, 2, 1, requires_grad=True)

    def step(weight: Tensor, centroids: Tensor) -> Tensor:
        return ck.lookup(indices, centroids, block_size=(2, 3), weight=weight, mask=mask)

    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiles else step
    with ck.use_backend(backend):
        function(weight, centroids).backward(torch.tensor([[1.0, 2, 4], [8, 16, 32]]))
    assert weight.grad is not None
    assert centroids.grad is not None
    assert weight.grad.tolist() == [[1, 0, 4], [8, 16, 0]]
    assert centroids.grad.flatten().tolist() == [17, 12]


@many
@given(palette_cases(special=False))
def test_gradient_backends_agree(case: PaletteCase) -> None:
    """Sums in float64, in different orders: the same to the last bit of float32 or the one beside it."""
    indices, upstream = case.indices(), case.tensor(seed=1).to(case.palette_dtype)
    results = []
    for backend in ("reference", "auto"):
        centroids = case.centroids().requires_grad_()
        with ck.use_backend(backend):
            ck.lookup(indices, centroids, block_size=case.block_size).backward(upstream)
        assert centroids.grad is not None
        assert centroids.grad.dtype == case.palette_dtype
        results.append(centroids.grad.float())
    scale = float(upstream.abs().float().sum()) + 1e-30
    eps = max(torch.finfo(case.palette_dtype).eps, torch.finfo(torch.float32).eps)
    close = (results[0] - results[1]).abs() <= 1e-9 * scale + eps * results[0].abs()
    overflow = results[0] == results[1]  # float16 sums may both be infinite
    assert bool((close | overflow).all())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dim", [1, 2])
def test_gradients_by_definition(backend: str, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 3, (4 // dim, 6), generator=generator, dtype=torch.uint8)
    centroids = torch.randn(2, 3, dim, generator=generator).requires_grad_()
    weight = torch.randn(4, 6, generator=generator).requires_grad_()
    upstream = torch.randn(4, 6, generator=generator)
    with ck.use_backend(backend):
        found = ck.lookup(indices, centroids, block_size=(4, 3), weight=weight)
        found.backward(upstream)
    assert weight.grad is not None
    assert centroids.grad is not None
    assert_same_bits(weight.grad, upstream)
    expected = torch.zeros(2, 3, dim, dtype=torch.float64)
    for row in range(4):
        for column in range(6):
            index = int(indices[row // dim, column])
            expected[column // 3, index, row % dim] += float(upstream[row, column])
            assert found[row, column] == centroids[column // 3, index, row % dim]
    torch.testing.assert_close(centroids.grad, expected.float())


def test_gradient_does_not_depend_on_threads() -> None:
    """To the last bit, with enough elements for many threads and sums that rounding would tell apart."""
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(1000, 1000, generator=generator) * 10 ** torch.randn(1000, 1, generator=generator)
    indices = torch.randint(0, 16, (1000, 1000), generator=generator, dtype=torch.uint8)
    threads = torch.get_num_threads()
    sums = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            sums.append(torch.ops.coreai_kernels.lookup_backward(upstream, indices, [1000, 1000], 16, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


# Inductor takes its time over the reference, which is nothing but torch's own operations.
@pytest.mark.parametrize(("backend", "compiler"), [("reference", "aot_eager"), ("auto", "inductor")])
def test_compiles_without_a_graph_break(backend: str, compiler: str) -> None:
    indices = torch.randint(0, 4, (8, 6), dtype=torch.uint8)
    weight, centroids = torch.randn(8, 6), torch.randn(2, 4, 1)

    def step(weight: Tensor, centroids: Tensor) -> Tensor:
        return ck.lookup(indices, centroids * 2, block_size=(4, 6), weight=weight).square().sum()

    results = []
    with ck.use_backend(backend):
        for function in (step, torch.compile(step, fullgraph=True, backend=compiler)):
            leaves = [weight.clone().requires_grad_(), centroids.clone().requires_grad_()]
            function(*leaves).backward()
            results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 2])
def test_opcheck(dim: int) -> None:
    indices = torch.randint(0, 4, (8 // dim, 6), dtype=torch.uint8)
    centroids = torch.randn(2, 4, dim, requires_grad=True)
    ops = torch.ops.coreai_kernels
    torch.library.opcheck(ops.lookup.default, (indices, centroids, [4, 6]))
    if dim == 1:
        torch.library.opcheck(ops.lookup.default, (indices, centroids, [4, 6], torch.rand(8, 6) < 0.5))
    torch.library.opcheck(ops.lookup_backward.default, (torch.randn(8, 6), indices, [4, 6], 4, dim))
    packed = ck.pack_bits(indices, 2)
    torch.library.opcheck(ops.lookup_packed.default, (packed, centroids.detach(), [8, 6], [4, 6], 2))


def test_any_index_stays_within_the_palette() -> None:
    """Indices that no palette has yield something, and neither read nor write elsewhere."""
    indices = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    for dtype in (torch.float32, torch.float16, torch.float64):
        for clusters in (1, 5, 20, 100):
            centroids = torch.ones(1, clusters, 1, dtype=dtype)
            assert ck.lookup(indices, centroids, block_size=(1, 256)).shape == (1, 256)
    sums = torch.ops.coreai_kernels.lookup_backward(torch.ones(1, 256), indices, [1, 256], 5, 1)
    assert sums.flatten().tolist() == [1.0] * 5


GOOD = {
    "indices": torch.zeros(4, 8, dtype=torch.uint8),
    "centroids": torch.ones(2, 4, 1),
    "block_size": (2, 8),
}


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (
            TypeError,
            "indices must be uint8; got torch.int64",
            {"indices": torch.zeros(4, 8, dtype=torch.int64)},
        ),
        (ValueError, "one palette per block, 2", {"centroids": torch.ones(1, 4, 1)}),
        (ValueError, "weight must have the shape looked up", {"weight": torch.ones(4, 7)}),
        (ValueError, "must divide the 2 rows", {"centroids": torch.ones(2, 4, 3)}),
        (TypeError, "mask must be bool; got torch.uint8", {"mask": torch.ones(4, 8, dtype=torch.uint8)}),
        (ValueError, "mask must have the shape and device", {"mask": torch.ones(4, 7, dtype=torch.bool)}),
    ],
)
def test_bad_arguments(error: type[Exception], text: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=text):
        ck.lookup(**GOOD | arguments)


@pytest.mark.parametrize(
    ("error", "text", "arguments"),
    [
        (ValueError, r"bits must be in 1\.\.8; got 9", {"bits": 9}),
        (TypeError, "packed must be uint8", {"packed": torch.zeros(8, dtype=torch.int8)}),
        (ValueError, "8 bytes for 32 indices of 2 bits", {"packed": torch.zeros(9, dtype=torch.uint8)}),
    ],
)
def test_bad_packed_arguments(error: type[Exception], text: str, arguments: dict[str, object]) -> None:
    call = {"packed": torch.zeros(8, dtype=torch.uint8), "shape": (4, 8), "bits": 2}
    with pytest.raises(error, match=text):
        ck.lookup_packed(**call | {"centroids": torch.ones(2, 4, 1), "block_size": (2, 8)} | arguments)
