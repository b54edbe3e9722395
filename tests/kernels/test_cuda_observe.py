"""The CUDA C++ of ``observe_range`` and ``choose_qparams`` without a GPU: its operators run on the CPU."""

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coreai_kernels as ck  # noqa: F401  (defines the operators)
from coreai_kernels import Format, ScaleFormat, Scheme
from coreai_kernels.reference.observe_range import observe_range as reference_range
from coreai_kernels.reference.qparams import choose_qparams as reference_choice
from tests.kernels.cuda_support import ROOT, behind, emulated_operators
from tests.kernels.support import SPECIAL, Case, assert_same_bits, cases

pytestmark = pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="needs the source tree")

OPERATORS = ["observe_range", "choose_qparams"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_operators("observe_range", OPERATORS, tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def turns(dtype: torch.dtype, library: ctypes.CDLL) -> Iterator[None]:
    """Threads' turns in either order, which the type decides."""
    library.take_turns_backwards(dtype != torch.float16)
    yield
    library.take_turns_backwards(False)


def check_range(x: torch.Tensor, block: tuple[int, ...]) -> None:
    found = torch.ops.coreai_emulated.observe_range(x, block)
    for got, wanted, name in zip(found, reference_range(x, block), ("minimum", "maximum"), strict=True):
        assert_same_bits(got, wanted, f"{name} of {tuple(x.shape)} in blocks of {block}")
        assert got.is_contiguous()


@settings(max_examples=120, deadline=None)
@given(case=cases(), elements=st.sampled_from([0, 0, 0, 1]))
def test_any_blocks(library: ctypes.CDLL, case: Case, elements: int) -> None:
    x = case.tensor()
    if case.layout not in ("sliced", "expanded"):
        x = behind(x, elements)
    check_range(x, case.block_size)


# With blocks of 64 threads, of which five run at a time: one and many rounds, whole and in parts.
SHAPES = [
    *(((23, 1111), (23, 1111)), ((64, 1024), (64, 1024)), ((3000,), (3000,)), ((5, 3), (5, 3))),
    *(((3, 8192), (1, 8192)), ((40, 512), (1, 512)), ((9, 1056), (1, 1056)), ((2, 20480), (1, 20480))),
    *(((24, 512), (1, 32)), ((24, 512), (1, 16)), ((30, 512), (1, 8)), ((5, 256), (1, 256))),
    *(((41, 264), (41, 1)), ((1999, 16), (1999, 1)), ((64, 1024), (32, 1)), ((4, 16, 40), (1, 16, 1))),
    *(((6, 16), (1, 1)), ((3, 700, 8), (3, 700, 1)), ((2, 5, 3, 24), (2, 1, 3, 1))),
    *(((32, 64), (8, 16)), ((64, 128), (8, 32)), ((6, 8, 96), (3, 4, 32)), ((7, 27), (1, 9))),
    *(((6, 5, 7, 7), (6, 1, 7, 7)), ((6, 5, 8, 8), (6, 1, 8, 8)), ((64, 2, 32, 32), (64, 1, 32, 32))),
]


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_way(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape, block in SHAPES:
        x = torch.randn(shape, generator=generator).to(dtype)
        check_range(x, block)
        check_range(-x.abs() - 1, block)
        x.view(-1)[0] = float("nan")
        check_range(x, block)
        for value in SPECIAL:
            x.view(-1)[torch.randint(0, x.numel(), (1,), generator=generator)] = value
        check_range(x, block)
        check_range(torch.full_like(x, -0.0), block)


KINDS = [
    *(
        (Format.INT, -8.0, 7.0),
        (Format.INT, 0.0, 255.0),
        (Format.INT, -127.0, 127.0),
        (Format.INT, 1.0, 200.0),
    ),
    *((Format.E4M3, -448.0, 448.0), (Format.E5M2, -57344.0, 57344.0), (Format.E2M1, -6.0, 6.0)),
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("scale_format", ScaleFormat)
@pytest.mark.parametrize(("format", "low", "high"), KINDS)
def test_choose_qparams(format: Format, low: float, high: float, scale_format: ScaleFormat) -> None:
    generator = torch.Generator().manual_seed(2)
    special = torch.tensor(SPECIAL)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for scheme, dtype, numel in itertools.product(Scheme, dtypes, (0, 1, 7, 1000)):
        around_zero = scheme != Scheme.ASYMMETRIC and -low >= high
        can_be_integers = scale_format == ScaleFormat.E8M0 and around_zero
        if format == Format.INT and scale_format != ScaleFormat.FLOAT32 and not can_be_integers:
            continue
        bounds = torch.randn(2, numel, generator=generator) * 2.0 ** torch.randint(
            -20, 20, (2, numel), generator=generator
        )
        chosen = torch.randint(0, 9 * len(SPECIAL), bounds.shape, generator=generator)
        if numel != 1000 or scale_format != ScaleFormat.E4M3:
            bounds = torch.where(chosen < len(SPECIAL), special[chosen.clamp(max=len(SPECIAL) - 1)], bounds)
        minimum, maximum = bounds.to(dtype)
        arguments = (minimum, maximum, scheme, format, low, high, scale_format)
        found = torch.ops.coreai_emulated.choose_qparams(*arguments)
        names = ("scale", "zero point", "minimum")
        for got, wanted, name in zip(found, reference_choice(*arguments), names, strict=True):
            assert_same_bits(got, wanted, f"{name} of {numel} with {scheme!r} in {dtype}")


@pytest.mark.usefixtures("library")
def test_errors_name_the_argument() -> None:
    choose = torch.ops.coreai_emulated.choose_qparams
    with pytest.raises(RuntimeError, match="min_val and max_val must have one shape"):
        choose(torch.zeros(3), torch.zeros(2), 0, 0, -8.0, 7.0, 0)
    with pytest.raises(RuntimeError, match="min_val must be float32, bfloat16, float16 or float64"):
        choose(torch.zeros(3, dtype=torch.int32), torch.zeros(3), 0, 0, -8.0, 7.0, 0)
