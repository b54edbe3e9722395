"""The CUDA C++ of fake quantization without a GPU: its operators run on the CPU."""

import ctypes
import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck  # noqa: F401  (defines the operators)
from coreai_kernels import Format
from coreai_kernels.reference import fake_quantize as reference
from tests.kernels.cuda_support import ROOT, behind, emulated_operators
from tests.kernels.support import DTYPES, SPECIAL, Case, assert_same_bits, assert_same_memory_format, cases

pytestmark = pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="needs the source tree")

OPERATORS = ["fake_quantize", "fake_quantize_forward", "fake_quantize_backward", "fake_quantize_backward_"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_operators("fake_quantize", OPERATORS, tmp_path_factory.mktemp("emulation"))


@pytest.fixture(params=["forwards", "backwards"])
def turns(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[None]:
    """Threads' turns in either order."""
    library.take_turns_backwards(request.param == "backwards")
    yield
    library.take_turns_backwards(False)


def check_forward(x: Tensor, *args: object) -> None:
    expected, bits = reference.forward(x, *args, True)  # type: ignore[arg-type]
    operator = torch.ops.coreai_emulated.fake_quantize_forward
    before = x.clone()
    y, mask = operator(x, *args, True)
    assert_same_bits(y, expected, "output")
    assert_same_memory_format(y, expected)
    assert torch.equal(mask, bits), "mask"
    assert_same_bits(x, before, "input")
    y, mask = operator(x, *args, False)
    assert_same_bits(y, expected, "output without a mask")
    assert mask.numel() == 0


def parameters(case: Case, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales around what suits the values, and some that do not; zero points or offsets of integers."""
    generator = torch.Generator().manual_seed(seed)
    grid = case.grid
    spread = 2.0 ** torch.randint(-3, 3, grid, generator=generator)
    scale = case.magnitude * spread * (1 + torch.rand(grid, generator=generator)) / case.quant_max
    minval = case.magnitude * torch.randn(grid, generator=generator)
    if case.special:
        odd = torch.tensor([2 - 2**-23, 2.0**-70, 2.0**70, 2.0**-126, math.inf, math.nan, 1.0])
        chosen = torch.randint(0, 40, grid, generator=generator)
        scale = torch.where(chosen < len(odd), odd[chosen.clamp(max=len(odd) - 1)], scale)
        minval = torch.where(minval < 0.2, torch.tensor(-0.0), minval)
    far = torch.randint(-300, 300, grid, generator=generator, dtype=torch.int32)
    kind = seed % 4 if case.format == Format.INT else 0
    return scale, {1: far, 2: far % 16}.get(kind), minval if kind == 3 else None


@settings(max_examples=250, deadline=None)
@given(case=cases(), seed=st.integers(0, 7), elements=st.sampled_from([0, 0, 0, 1]))
def test_any_blocks(library: ctypes.CDLL, case: Case, seed: int, elements: int) -> None:
    x = case.tensor()
    if case.layout not in ("sliced", "expanded"):
        x = behind(x, elements)
    scale, zero_point, minval = parameters(case, seed)
    check_forward(x, scale, zero_point, minval, case.block_size, case.format, case.quant_min, case.quant_max)


FORMATS = {
    "wide": (Format.INT, -200.0, 300.0),
    "int2": (Format.INT, -2.0, 1.0),
    "int4": (Format.INT, -8.0, 7.0),
    "uint8": (Format.INT, 0.0, 255.0),
    "int8": (Format.INT, -128.0, 127.0),
    "e4m3": (Format.E4M3, -448.0, 448.0),
    "e5m2": (Format.E5M2, -57344.0, 57344.0),
    "e2m1": (Format.E2M1, -6.0, 6.0),
}
# With tiles of 64 threads' packs: more than the launch has blocks, one and a rest, less than one.
SHAPES = [
    ((23, 1111), (23, 1111)),
    ((3000,), (3000,)),
    ((5, 3), (5, 3)),
    *(((40, 512), (1, 512)), ((9, 1056), (1, 1056))),
    *(((24, 512), (1, 32)), ((24, 512), (1, 16)), ((30, 512), (1, 8))),
    *(((41, 264), (41, 1)), ((64, 1024), (32, 1)), ((4, 16, 40), (1, 16, 1)), ((6, 16), (1, 1))),
    *(((32, 64), (8, 16)), ((64, 128), (8, 32)), ((6, 8, 96), (3, 4, 32)), ((7, 27), (1, 9))),
]


def per_element(values: Tensor, block: Sequence[int]) -> Tensor:
    for axis, part in enumerate(block):
        values = values.repeat_interleave(part, axis)
    return values


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_way(name: str, dtype: torch.dtype) -> None:
    """All granularities, of values next to where rounding changes, and of some that are not numbers."""
    fmt, low, high = FORMATS[name]
    generator = torch.Generator().manual_seed(len(name))
    for shape, block in SHAPES:
        grid = [size // part for size, part in zip(shape, block, strict=True)]
        scale = 2.0 ** torch.randint(-9, 3, grid, generator=generator).float()
        scale *= 1 + torch.rand(grid, generator=generator)
        # Halves of steps, and the numbers just beside them.
        steps = torch.randint(-20, 21, shape, generator=generator) / 2 * math.ceil(high / 7)
        beside = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int32)
        x = ((per_element(scale, block) * steps).view(torch.int32) + beside).view(torch.float32).to(dtype)
        zero_point = torch.randint(-3, 4, grid, generator=generator, dtype=torch.int32)
        map_to = (list(block), fmt, low, high)
        check_forward(x, scale, zero_point if fmt == Format.INT and low < 0 else None, None, *map_to)
        if fmt == Format.INT:
            check_forward(x, scale, None, -3.3 * scale, *map_to)
        for value in SPECIAL:
            x.view(-1)[torch.randint(0, x.numel(), (1,), generator=generator)] = value
        check_forward(x, scale, None, None, *map_to)


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("passing", [0.5, 0.999, 1.0])
def test_gradients(passing: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    special = torch.tensor([*SPECIAL, 1.0, 2.0, 3.0, -4.0])
    ops = torch.ops.coreai_emulated
    for shape in [(0,), (1,), (7,), (8,), (2049,), (3, 5000), (4, 6, 5, 3)]:
        for elements in (0, 1):
            grad = special[torch.randint(0, len(special), shape, generator=generator)].to(dtype)
            inside = torch.rand(grad.numel(), generator=generator) < passing
            mask = reference.pack_mask(inside)
            orders = [[], [1, 3, 0, 2]] if grad.dim() == 4 else [[]]
            for order in orders:
                expected = reference.backward(grad, mask, order or list(range(grad.dim())))
                found = ops.fake_quantize_backward(behind(grad, elements), mask, order)
                assert_same_bits(found, expected, f"gradient of {shape}")
                assert_same_memory_format(found, expected)
                # In the order of the mask, it may be overwritten.
                axes = order or list(range(grad.dim()))
                laid_out = grad.permute(axes).contiguous().permute([axes.index(i) for i in range(grad.dim())])
                own = behind(laid_out, elements)
                ops.fake_quantize_backward_(own, mask, order)
                assert_same_bits(own, expected, f"gradient of {shape} in place")


@pytest.mark.usefixtures("library")
def test_errors_name_the_argument() -> None:
    ops = torch.ops.coreai_emulated
    x, ints = torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="scale must have one value per block, that is 4; it has 2"):
        ops.fake_quantize_forward(x, torch.ones(2), None, None, [1, 8], 0, -8.0, 7.0, True)
    with pytest.raises(RuntimeError, match="scale must be float32"):
        ops.fake_quantize_forward(x, ints, None, None, [1, 8], 0, -8.0, 7.0, True)
    with pytest.raises(RuntimeError, match="zero_point must be int32"):
        ops.fake_quantize_forward(x, torch.ones(4), torch.ones(4), None, [1, 8], 0, -8.0, 7.0, True)
    with pytest.raises(RuntimeError, match="mask must have one bit per element of grad: 4 bytes; it has 3"):
        ops.fake_quantize_backward(x, torch.zeros(3, dtype=torch.uint8), [])
    with pytest.raises(RuntimeError, match="grad must lie in memory as order says"):
        ops.fake_quantize_backward_(x.t(), torch.zeros(4, dtype=torch.uint8), [])


# Scales and values, as bits, where the reciprocal that the instruction gives is too far off for one
# correction: the quotient, divided by the third number, lies next to half of an odd number.
HARD = [
    (0x3FFFFFFF, 0x44000000, 512),
    (0x3FFFFFFE, 0x443FFFFF, 256),
    (0x3FFFFFFC, 0x441FFFFE, 128),
    (0x3FFE0007, 0x44476E05, 4),
    (0x3FFE0006, 0x4468AB05, 2),
    (0x3FFE0003, 0x44535602, 4),
    (0x3FFDFFFE, 0x443E00FF, 2),
    (0x3FFD0007, 0x446AB786, 2),
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("scale", "x", "divisor"), HARD)
def test_hard_quotients(scale: int, x: int, divisor: int) -> None:
    value, scales = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (x, scale))
    values = (value / divisor).repeat(2**14)
    check_forward(values, scales, None, None, [2**14], Format.INT, 0.0, 255.0)


def test_quotients_of_positions(library: ctypes.CDLL) -> None:
    """By a product and a shift: of all divisors to 300 and some others, around the multiples of each."""
    library.quotient.restype = ctypes.c_uint32
    choice = random.Random(1)
    divisors = [*range(1, 300), *(choice.randrange(300, 2**31) for _ in range(300)), 2**30, 2**31 - 1]
    for divisor in divisors:
        most = (2**31 - 1) // divisor
        for times in {0, 1, most, choice.randint(0, most), choice.randint(0, most)}:
            for number in {times * divisor - 1, times * divisor, times * divisor + divisor - 1}:
                if 0 <= number < 2**31:
                    assert library.quotient(number, divisor) == number // divisor, (number, divisor)
