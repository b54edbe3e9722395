"""``palettize``: the nearest centroid, by definition and on every backend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coreai_kernels as ck
from coreai_kernels import native
from coreai_kernels.reference.kmeans_1d import round_decimals
from coreai_kernels.reference.layout import to_vectors
from coreai_kernels.reference.palettize import bounds_before_rounding
from tests.kernels.palette_support import PaletteCase, many, palette_cases
from tests.kernels.support import assert_same_bits, assert_same_memory_format


@many
@given(palette_cases())
def test_backends_agree(case: PaletteCase) -> None:
    results = {}
    weight, centroids = case.tensor(), case.centroids()
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            results[backend] = ck.palettize(weight, centroids, block_size=case.block_size)
    assert_same_bits(results["auto"], results["reference"])
    assert_same_memory_format(results["auto"], results["reference"])


@many
@given(palette_cases(max_clusters=33, special=False))
def test_nearest_by_definition(case: PaletteCase) -> None:
    """No centroid is nearer, by distances in float64; and none as near has a lower index."""
    weight, centroids = case.tensor().float(), case.centroids().float()
    found = ck.palettize(weight, centroids, block_size=case.block_size)
    vectors = to_vectors(weight, case.block_size, case.dim).double()
    rows = (case.block_size[0] // case.dim, *case.block_size[1:]) if case.block_size else ()
    chosen = to_vectors(found, rows)[:, :, 0].long()
    distance = (vectors[:, :, None] - centroids.double()[:, None]).square().sum(3)
    at = distance.gather(2, chosen.unsqueeze(2)).squeeze(2)
    least = distance.min(2).values
    if case.dim == 1:
        assert torch.equal(at, least)
        assert torch.equal(chosen, distance.argmin(2))
    else:
        assert bool((at <= least * (1 + 1e-5) + 1e-30).all())


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ties_go_to_the_lower_index(backend: str) -> None:
    weight = torch.tensor([[1.5, 1.5000001, 1.4999999, 2.0, 3.0]])
    with ck.use_backend(backend):
        up = ck.palettize(weight, torch.tensor([[[1.0], [2.0], [2.0]]]), block_size=(1, 5))
        down = ck.palettize(weight, torch.tensor([[[2.0], [1.0], [2.0]]]), block_size=(1, 5))
    assert up.tolist() == [[0, 1, 0, 1, 1]]
    assert down.tolist() == [[0, 0, 1, 0, 0]]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_and_infinities(backend: str) -> None:
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[nan, inf, -inf, -0.0, 1e-45, 3.4e38]])
    with ck.use_backend(backend):
        found = ck.palettize(weight, torch.tensor([[[0.0], [5.0], [-5.0]]]), block_size=(1, 6))
        pairs = ck.palettize(
            torch.tensor([[nan, 1.0], [0.0, nan]]),
            torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]),
            block_size=(2, 2),
        )
    assert found.tolist() == [[2, 1, 2, 0, 0, 1]]
    assert pairs.tolist() == [[0, 0]]


def test_the_midpoint_is_exact() -> None:
    """Neighbouring floats, whose midpoint float32 cannot hold, and centroids of very different magnitude."""
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    centroids = torch.stack([low, high])[None, :, None]
    assert ck.palettize(torch.stack([low, high])[None], centroids, block_size=(1, 2)).tolist() == [[0, 1]]
    far = torch.tensor([[[0.0], [1e30]]])
    weight = torch.tensor([[4.9e29, 5.1e29, 1e38]])
    assert ck.palettize(weight, far, block_size=(1, 3)).tolist() == [[0, 1, 1]]


@many
@given(palette_cases(), st.integers(-2, 5))
def test_decimals_are_those_of_rounded_values(case: PaletteCase, decimals: int) -> None:
    weight, centroids = case.tensor(), case.centroids()
    if case.dim > 1:
        with pytest.raises(ValueError, match="decimals are for scalars"):
            ck.palettize(weight, centroids, block_size=case.block_size, decimals=decimals)
        return
    rounded = round_decimals(weight.float(), decimals)
    wanted = ck.palettize(rounded, centroids, block_size=case.block_size)
    for backend in ("reference", "auto"):
        with ck.use_backend(backend):
            found = ck.palettize(weight, centroids, block_size=case.block_size, decimals=decimals)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("decimals", [-30, -3, 0, 4, 7, 30])
def test_bounds_before_rounding_are_exact(decimals: int) -> None:
    """Bounds at, and just beside, multiples of a step and half-way between them; subnormal and huge ones."""
    exponents = torch.arange(-140.0, 128.0, 3.7)
    bounds = torch.cat([torch.randn(200), torch.exp2(exponents), -torch.exp2(exponents), torch.zeros(1)])
    steps = torch.arange(-20, 21) / 2 * (1.0 if decimals in (-30, 30) else 10.0**-decimals)
    bounds = torch.cat([bounds, steps, torch.nextafter(steps, torch.tensor(1e9)), torch.tensor([-torch.inf])])
    found = bounds_before_rounding(bounds, decimals)
    after = torch.nextafter(found, torch.tensor(torch.inf))
    assert bool((round_decimals(found, decimals) <= bounds).all())
    assert bool((round_decimals(after, decimals) > bounds).all())
    at_end = bounds_before_rounding(torch.tensor([torch.inf]), decimals)
    assert at_end.tolist() == [torch.inf]
    # The palettes whose midpoints these are have the same bounds in native code: neighbours tell them apart.
    for bound, low, high in zip(bounds.tolist(), found, after, strict=True):
        if abs(bound) > 1e30 or bound == 0 or float(torch.tensor(bound) * 2) / 2 != bound:
            continue
        pair = torch.tensor([[[bound - abs(bound)], [bound + abs(bound)]]])
        if float((pair[0, 0].double() + pair[0, 1].double()) / 2) == bound:
            weight = torch.stack([low, high])[None]
            assert ck.palettize(weight, pair, block_size=(1, 2), decimals=decimals).tolist() == [[0, 1]]


def test_opcheck() -> None:
    for dim, shape in ((1, (8, 6)), (2, (4, 2))):
        args = (torch.randn(8, 6), torch.randn(2, 4, dim), [4, 6])
        torch.library.opcheck(torch.ops.coreai_kernels.palettize.default, args)
        if dim == 1:
            torch.library.opcheck(torch.ops.coreai_kernels.palettize.default, (*args, 2))
        assert torch.ops.coreai_kernels.palettize(*args).dim() == len(shape)


def test_threads_do_not_matter() -> None:
    weight, centroids = torch.randn(300, 1000), torch.randn(3, 16, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(ck.palettize(weight, centroids, block_size=(100, 1000)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


BAD = [
    (TypeError, "weight must be one of", {"weight": torch.ones(4, 8, dtype=torch.int32)}),
    (TypeError, "centroids must be one of", {"centroids": torch.ones(2, 4, 1, dtype=torch.int8)}),
    (ValueError, "1 to 256 clusters", {"centroids": torch.ones(2, 257, 1)}),
    (ValueError, "1 to 256 clusters", {"centroids": torch.ones(2, 4)}),
    (ValueError, "one palette per block, 2", {"centroids": torch.ones(3, 4, 1)}),
    (ValueError, "must divide the 2 rows of a block; got 3", {"centroids": torch.ones(2, 4, 3)}),
    (ValueError, "block_size.*does not divide", {"block_size": (3, 8)}),
    (ValueError, "decimals must be in", {"decimals": 31}),
    (ValueError, "decimals are for scalars", {"decimals": 3, "centroids": torch.ones(2, 4, 2)}),
]


@pytest.mark.parametrize(("error", "text", "arguments"), BAD)
def test_bad_arguments(error: type[Exception], text: str, arguments: dict[str, object]) -> None:
    call = {"weight": torch.randn(4, 8), "centroids": torch.randn(2, 4, 1), "block_size": (2, 8)} | arguments
    with pytest.raises(error, match=text):
        ck.palettize(**call)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """The palette tests again, in a process that is limited to less than this CPU has."""
    if native.extension is None or isa not in native.extension.build_info()["cpu_isas"]:
        pytest.skip(f"no native code for {isa} in this build")
    here = Path(__file__)
    names = [f"test_{name}.py" for name in ("palettize", "lookup", "kmeans", "kmeans_1d", "soft_palettize")]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "backends_agree",
            "--no-header",
        ]
        + [str(here.with_name(name)) for name in names if here.with_name(name).exists()],
        cwd=here.parents[2],
        env=os.environ | {"COREAI_CPU_CAPABILITY": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "lacks that instruction set" in result.stdout + result.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert result.returncode == 0, result.stdout[-4000:]
