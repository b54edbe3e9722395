"""The CUDA C++ of ``observe_and_fake_quantize`` without a GPU: its operators run on the CPU."""

import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import coreai_kernels as ck  # noqa: F401  (defines the operators)
from coreai_kernels import Format, QuantConfig, RangeUpdate, ScaleFormat, Scheme
from coreai_kernels.reference.observe_and_fake_quantize import observe_and_fake_quantize as reference
from tests.kernels.cuda_support import ROOT, behind, emulated_operators
from tests.kernels.support import SPECIAL, Case, assert_same_bits, assert_same_memory_format, cases
from tests.kernels.triton_support import STEPS, Step

pytestmark = pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="needs the source tree")

FORMS = ["observe_and_fake_quantize", "observe_and_fake_quantize_", "observe_and_fake_quantize_unpacked_"]
NAMES = ["output", "mask", "scale", "zero point", "minimum", "running minimum", "running maximum"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulated_operators("observe_and_fake_quantize", FORMS, tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def turns(dtype: torch.dtype, library: ctypes.CDLL) -> Iterator[None]:
    """Threads' turns in either order, which the type decides."""
    library.take_turns_backwards(dtype != torch.float16)
    yield
    library.take_turns_backwards(False)


def check_step(x: Tensor, running: tuple[Tensor, Tensor] | None, config: QuantConfig, form: str) -> None:
    low, high = running or (None, None)
    expected = reference(x, low, high, config, True)
    ops = torch.ops.coreai_emulated
    before = x.clone()
    if form == FORMS[0]:
        found = ops.observe_and_fake_quantize(x, low, high, *config.arguments(), True)
        state_wanted = list(expected)
    else:
        grid = expected[2].shape
        state = [torch.full(grid, 7.0), torch.full(grid, 7, dtype=torch.int32), torch.full(grid, 7.0)]
        state += [value.clone() for value in running or (torch.zeros(grid, dtype=x.dtype),) * 2]
        if form == FORMS[1]:
            found = ops.observe_and_fake_quantize_(x, *state, running is not None, config.packed(), True)
        else:
            # What the caller does not keep the kernels still need.
            state[1 if config.use_minval else 2] = None
            arguments = (*state, running is not None, *config.arguments())
            found = ops.observe_and_fake_quantize_unpacked_(x, *arguments, False)
            assert found[1].numel() == 0
            found = (found[0], expected[1])
        found = (*found, *state)
        state_wanted = [want if got is not None else None for got, want in zip(found, expected, strict=True)]
    for got, wanted, name in zip(found, state_wanted, NAMES, strict=True):
        if wanted is not None:
            assert_same_bits(got, wanted, f"{name} of {tuple(x.shape)} with {config}")
    assert_same_memory_format(found[0], expected[0])
    assert_same_bits(x, before, "input")


def running_of(grid: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low, high = ((torch.rand(grid, generator=generator) * sign).to(dtype) for sign in (-1, 1))
    return low, high


@settings(max_examples=120, deadline=None)
@given(
    case=cases(),
    scheme=st.sampled_from(list(Scheme)),
    update=st.sampled_from(list(RangeUpdate)),
    use_minval=st.booleans(),
    scale_format=st.sampled_from(list(ScaleFormat)),
    fixed=st.sampled_from([(None, None), (-0.7, None), (None, 1.3), (-2.0, 0.3)]),
    has_running=st.booleans(),
    elements=st.sampled_from([0, 0, 0, 1]),
    form=st.sampled_from(FORMS),
)
def test_any_blocks(
    library: ctypes.CDLL,
    case: Case,
    scheme: Scheme,
    update: RangeUpdate,
    use_minval: bool,
    scale_format: ScaleFormat,
    fixed: tuple[float | None, float | None],
    has_running: bool,
    elements: int,
    form: str,
) -> None:
    x = case.tensor()
    if case.layout not in ("sliced", "expanded"):
        x = behind(x, elements)
    config = QuantConfig(
        block_size=case.block_size,
        scheme=scheme,
        format=case.format,
        quant_min=case.quant_min,
        quant_max=case.quant_max,
        use_minval=use_minval and case.format == Format.INT,
        update=update,
        averaging_constant=0.1,
        range_min=fixed[0],
        range_max=fixed[1],
        scale_format=case.suited(scale_format, scheme),
    )
    check_step(x, running_of(case.grid, x.dtype, case.seed) if has_running else None, config, form)


# With blocks of 64 threads, of which five run at a time: short runs, one and two warps to a row, whole and in
# part; a tensor in one block, in several that hold it, and in parts; columns and other blocks one by one.
SHAPES = [
    *(
        ((24, 512), (1, 32)),
        ((24, 512), (1, 16)),
        ((41, 256), (1, 256)),
        ((5, 64), (1, 64)),
        ((9, 128), (1, 128)),
    ),
    *(((40, 512), (1, 512)), ((9, 1056), (1, 1056)), ((3, 1000), (1, 1000)), ((3, 4096), (1, 4096))),
    *(((23, 1111), (23, 1111)), ((3000,), (3000,)), ((4096,), (4096,)), ((5, 3), (5, 3))),
    *(((41, 264), (41, 1)), ((64, 512), (32, 1)), ((4, 16, 40), (1, 16, 1)), ((6, 16), (1, 1))),
    *(((32, 64), (8, 16)), ((6, 8, 96), (3, 4, 32)), ((7, 27), (1, 9))),
]


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_way(step: Step, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for turn, (shape, block) in enumerate(SHAPES):
        config = QuantConfig(block_size=block, **step.config)
        x = torch.randn(shape, generator=generator).to(dtype)
        grid = tuple(size // part for size, part in zip(shape, block, strict=True))
        check_step(x, running_of(grid, dtype, turn), config, FORMS[turn % 3])
        for value in SPECIAL:
            x.view(-1)[torch.randint(0, x.numel(), (1,), generator=generator)] = value
        check_step(x, None if turn % 2 else running_of(grid, dtype, turn), config, FORMS[(turn + 1) % 3])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int4_latest", "e2m1_e8m0", "mxint8"])
def test_blocks_of_all_magnitudes(name: str, dtype: torch.dtype) -> None:
    """Scales from the smallest to the largest; of each block, values from its own magnitude down to zero."""
    (step,) = [each for each in STEPS if each.name == name]
    exponents = torch.arange(-149.0, 128.0)[:, None] - torch.arange(32.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.ldexp(2 * torch.rand(exponents.shape, generator=generator) - 1, exponents + 1).to(dtype)
    check_step(x, None, QuantConfig(block_size=(1, 32), **step.config), FORMS[1])


# Blocks of 64 threads that the device says it holds at the same time, and those that it takes. Without such
# launches at all; with fewer multiprocessors for this stream than the device has.
DEVICES = {"held": (8, 8), "no cooperative launches": (0, 0), "refused": (8, 0)}
# Of float32 and of 16 bits: three tiles a block, of which the last is not whole and ends within a byte of the
# mask; whole tiles; tiles for fewer blocks than there are.
LARGE = {4: (20001, 18432, 16392), 2: (40001, 36864, 16400)}


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_tensors_that_several_blocks_of_threads_hold(
    step: Step, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    """One block that is too large for a block of threads."""
    # Scales of two levels are chosen by other kernels.
    is_held = step.config.get("scale_format") != ScaleFormat.E4M3
    generator = torch.Generator().manual_seed(1)
    for numel in LARGE[dtype.itemsize]:
        x = torch.randn(numel, generator=generator).to(dtype)
        config = QuantConfig(block_size=(numel,), **step.config)
        before = library.whole_grids()
        for running in (running_of((1,), dtype, 1), None):
            check_step(x, running, config, FORMS[1])
        for value in filter(math.isfinite, SPECIAL):
            x[torch.randint(0, numel, (1,), generator=generator)] = value
        check_step(x, None, config, FORMS[0])
        for place, value in ((0, math.inf), (numel // 2, math.nan), (-1, -math.inf), (-1, math.nan)):
            changed = x.clone()
            changed[place] = value
            check_step(changed, running_of((1,), dtype, 2), config, FORMS[2])
        assert library.whole_grids() - before == 7 * is_held


# Columns: the rows of a block, and whether blocks of threads wait for each other, in float32 and in 16 bits.
# Where they need not, one has all rows. With packs and rows that are no whole tiles, and with several groups.
COLUMNS = [
    ((64, 64), 64, False, False),
    ((150, 40), 150, True, True),
    ((300, 16), 300, True, False),
    ((580, 8), 290, False, False),
    ((400, 24), 200, True, True),
]


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_columns_that_blocks_of_threads_hold(step: Step, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    is_held = step.config.get("scale_format") != ScaleFormat.E4M3
    generator = torch.Generator().manual_seed(1)
    for shape, rows, *waits in COLUMNS:
        x = torch.randn(shape, generator=generator).to(dtype)
        config = QuantConfig(block_size=(rows, 1), **step.config)
        grid = (shape[0] // rows, shape[1])
        launches, whole_grids = library.launches(), library.whole_grids()
        check_step(x, running_of(grid, dtype, 1), config, FORMS[1])
        for value in SPECIAL:
            x.view(-1)[torch.randint(0, x.numel(), (3,), generator=generator)] = value
        x[-1, -1] = math.nan
        check_step(x, running_of(grid, dtype, 2), config, FORMS[2])
        check_step(x, None, config, FORMS[0])
        if is_held:
            assert library.launches() - launches == 3
            assert library.whole_grids() - whole_grids == 3 * waits[dtype.itemsize == 2]


# Elements of NVFP4: what one block of threads holds; several, of one to three tiles, the last of which is not
# whole; and more than all hold.
NVFP4 = {4: (1008, 1040, 20000, 24576, 24592), 2: (2000, 2064, 40016, 49152, 49168)}


@pytest.mark.usefixtures("turns")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update", list(RangeUpdate), ids=lambda update: update.name)
def test_nvfp4_that_blocks_of_threads_hold(
    update: RangeUpdate, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    """Scales of all blocks follow from the largest magnitude, wherever that is."""
    step = next(each for each in STEPS if each.name == "nvfp4")
    config = QuantConfig(block_size=(16,), **(step.config | {"update": update}))
    generator = torch.Generator().manual_seed(1)
    sizes = NVFP4[dtype.itemsize]
    for numel in sizes:
        x = torch.randn(numel, generator=generator).to(dtype)
        running = running_of((numel // 16,), dtype, 1)
        launches, whole_grids = library.launches(), library.whole_grids()
        check_step(x, running, config, FORMS[1])
        for value in filter(math.isfinite, SPECIAL):
            x[torch.randint(0, numel, (3,), generator=generator)] = value
        check_step(x, None, config, FORMS[0])
        for place, value in ((0, 1e4), (-1, -1e4), (numel // 2, math.inf), (numel // 3, math.nan)):
            changed = x.clone()
            changed[place] = value
            check_step(changed, running, config, FORMS[2])
        check_step(torch.zeros_like(x), None, config, FORMS[1])
        if numel == sizes[-1]:
            assert library.launches() - launches > 7
        else:
            assert library.launches() - launches == 7
            assert library.whole_grids() - whole_grids == 7 * (numel != sizes[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_ways_where_blocks_of_threads_cannot_wait(
    device: str, dtype: torch.dtype, library: ctypes.CDLL
) -> None:
    steps = {each.name: each for each in STEPS}
    fits = 8 * 3 * 64 * 4 * 16 // dtype.itemsize  # blocks, tiles, threads, packs, bytes
    columns = 8 * 8 * 16 // dtype.itemsize
    library.hold_blocks(*DEVICES[device])
    try:
        for shape, block, elements, holds in (
            ((fits,), (fits,), 0, True),
            ((fits + 1,), (fits + 1,), 0, False),
            ((fits,), (fits,), 1, False),
            ((110, columns // 2), (110, 1), 0, True),
            ((110, columns), (110, 1), 0, False),
            ((110, columns // 2), (110, 1), 1, False),
            ((fits,), (16,), 0, True),
            ((fits,), (16,), 1, False),
            ((fits,), (32,), 0, False),
        ):
            step = steps["nvfp4" if block[0] < 100 else "uint8_average"]
            x = torch.randn(shape, generator=torch.Generator().manual_seed(fits)).to(dtype)
            launches, whole_grids = library.launches(), library.whole_grids()
            config = QuantConfig(block_size=block, **step.config)
            grid = tuple(size // part for size, part in zip(shape, block, strict=True))
            check_step(behind(x, elements), running_of(grid, dtype, 1), config, FORMS[1])
            holds = holds and device == "held"
            assert library.whole_grids() - whole_grids == holds
            assert (library.launches() - launches == 1) == holds
    finally:
        library.hold_blocks(8, 8)


@pytest.mark.usefixtures("library")
def test_errors_name_the_argument() -> None:
    step = torch.ops.coreai_emulated.observe_and_fake_quantize_
    x, four = torch.zeros(4, 8), torch.zeros(4)
    config = QuantConfig((1, 8), Scheme.SYMMETRIC, Format.INT, -8.0, 7.0).packed()
    with pytest.raises(RuntimeError, match="scale must have one value per block, that is 4; it has 2"):
        step(x, torch.ones(2), None, None, None, None, False, config, True)
    with pytest.raises(RuntimeError, match="scale must be contiguous"):
        step(x, torch.ones(8)[::2], None, None, None, None, False, config, True)
    with pytest.raises(RuntimeError, match="running_min and running_max must both be given, or neither"):
        step(x, four, None, None, torch.zeros(4), None, False, config, True)
    with pytest.raises(RuntimeError, match="zero_point must be int32"):
        step(x, four, torch.zeros(4), None, None, None, False, config, True)
