"""Every Triton operator under Triton's interpreter against the reference, bit for bit.

Not collected by itself: the variable TRITON_INTERPRET must be set before anything imports triton.
``test_triton_interpreter.py`` runs this file in processes of its own; by hand:
``TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreted.py``.
"""

import copy
import os
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, ScaleFormat, Scheme, wide
from coreai_kernels.ops import library
from tests.kernels import random_calls, test_backends_agree
from tests.kernels.faster_interpreter import faster_interpreter
from tests.kernels.gptq_support import KINDS as GPTQ_KINDS
from tests.kernels.gptq_support import check_gptq_columns
from tests.kernels.gradient_support import DENSITIES, check_masked_in_place
from tests.kernels.learned_support import SHAPES, check_learnable_range, check_sampled_mask
from tests.kernels.learned_support import run as on_backend
from tests.kernels.mask_support import CONTENTS, Weight, check_blocks, check_nm, check_product
from tests.kernels.operator_samples import INEXACT, SAMPLES
from tests.kernels.reciprocal_support import check_by_reciprocal
from tests.kernels.reciprocal_support import draw as draw_for_reciprocal
from tests.kernels.support import assert_same_bits
from tests.kernels.test_quotients import STEPS as STEPS_OF
from tests.kernels.test_quotients import neighbours, scales
from tests.kernels.triton_support import (
    DTYPES,
    FOREACH,
    KINDS,
    LAYOUTS,
    STEPS,
    Kind,
    Layout,
    Step,
    check_fake_quantize,
    check_foreach_fake_quantize,
    check_foreach_step,
    check_observe_range,
    check_quantize,
    check_step,
    ids_of,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before anything imports triton"

# NumPy, on which the interpreter runs, warns of every NaN and overflow; they are among the inputs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def load() -> Iterator[Any]:
    """Under the faster interpreter: what Triton's ``load`` is outside of it."""
    import triton.language as tl

    load = tl.load
    with faster_interpreter():
        yield load
    assert tl.load is load


def table(choices: list, every: int = 1) -> list:
    """Layouts by choices, the dtypes taking turns; large layouts, which are slow here, with one choice."""
    rows = []
    for i, layout in enumerate(LAYOUTS):
        large = torch.Size(layout.shape).numel() > 4096
        for j, choice in enumerate(choices):
            wanted = j == i % len(choices) if large else (i + j) % every == 0
            if wanted:
                dtype = DTYPES[(i + j) // every % len(DTYPES)]
                name = f"{layout.name}-{choice.name}-{str(dtype).removeprefix('torch.')}"
                rows.append(pytest.param(layout, choice, dtype, id=name))
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
def test_gradients_in_place(dtype: torch.dtype, density: float) -> None:
    check_masked_in_place("triton", "cpu", dtype, density)


@pytest.mark.parametrize(("layout", "kind", "dtype"), table(KINDS, every=2))
def test_fake_quantize(layout: Layout, kind: Kind, dtype: torch.dtype) -> None:
    check_fake_quantize("triton", "cpu", layout, kind, dtype)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name in ("int8", "e4m3", "e2m1")], ids=ids_of
)
def test_fake_quantize_next_to_where_rounding_changes(kind: Kind) -> None:
    scale = scales(torch.Generator().manual_seed(2))[:25]
    x = neighbours(scale * STEPS_OF[kind.format])
    results = []
    for backend in ("reference", "triton"):
        leaf = x.clone().requires_grad_()
        with ck.use_backend(backend):
            y = ck.fake_quantize(leaf, scale, block_size=(1, x.shape[1]), **kind.config)
            y.backward(torch.ones_like(y))
        results.append((y.detach(), leaf.grad))
    for wanted, got, what in zip(*results, ("output", "gradient"), strict=True):
        assert_same_bits(got, wanted, what)


@pytest.mark.parametrize(("layout", "kind", "dtype"), table(KINDS, every=2))
def test_quantize_and_dequantize(layout: Layout, kind: Kind, dtype: torch.dtype) -> None:
    check_quantize("triton", "cpu", layout, kind, dtype)


@pytest.mark.parametrize("layout", LAYOUTS, ids=ids_of)
def test_observe_range(layout: Layout) -> None:
    for dtype in DTYPES:
        check_observe_range("triton", "cpu", layout, dtype)


@pytest.mark.parametrize(("layout", "step", "dtype"), table(STEPS, every=2))
def test_observe_and_fake_quantize(layout: Layout, step: Step, dtype: torch.dtype) -> None:
    check_step("triton", "cpu", layout, step, dtype)


@pytest.mark.parametrize(
    ("step", "functional"), list(zip(STEPS[:3], (False, True, False), strict=True)), ids=str
)
def test_tensor_in_parts(step: Step, functional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole tensor as one block too large for a program, several tiles to a program."""
    from coreai_kernels.triton import one_block

    monkeypatch.setattr(one_block, "_REPEAT_FROM", 1000)
    layout = Layout("large", (3, 11, 283), (3, 11, 283))
    check_step("triton", "cpu", layout, step, torch.bfloat16, functional=functional)


@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, cycle(DTYPES), strict=False)), ids=str)
def test_foreach_fake_quantize(kind: Kind, dtype: torch.dtype) -> None:
    check_foreach_fake_quantize("triton", "cpu", FOREACH, kind, dtype)


@pytest.mark.parametrize(("step", "dtype"), list(zip(STEPS, cycle(DTYPES), strict=False)), ids=str)
def test_foreach_observe_and_fake_quantize(step: Step, dtype: torch.dtype) -> None:
    check_foreach_step("triton", "cpu", FOREACH, step, dtype)


SMALL = [layout for layout in LAYOUTS if torch.Size(layout.shape).numel() <= 4096]


@pytest.mark.parametrize("layout", SMALL[2::3], ids=ids_of)
def test_64_bit_positions(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variants for more than 2**31 elements, on small tensors."""
    from coreai_kernels.triton import layout as geometry

    monkeypatch.setattr(geometry, "_WIDE_FROM", 0)
    geometry._geometry.cache_clear()
    try:
        check_fake_quantize("triton", "cpu", layout, KINDS[0], torch.float32)
        check_observe_range("triton", "cpu", layout, torch.bfloat16)
        check_step("triton", "cpu", layout, STEPS[1], torch.float32)
    finally:
        geometry._geometry.cache_clear()


def test_reduction_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The combine function itself, element by element, instead of NumPy's reductions."""
    import triton.language as tl

    from coreai_kernels.triton import elementwise

    monkeypatch.setattr(elementwise, "INTERPRETED", tl.constexpr(False))
    check_observe_range("triton", "cpu", Layout("rows", (6, 40), (1, 20)), torch.float32)
    check_observe_range("triton", "cpu", Layout("columns", (24, 4), (12, 1)), torch.float16)


@pytest.mark.parametrize("format", list(Format), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("scheme", list(Scheme), ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtypes", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float16)], ids=str)
def test_choose_qparams(format: Format, scheme: Scheme, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    flat = Layout("flat", (300,), (300,))
    low, high = flat.tensor(dtypes[0]), flat.tensor(dtypes[1], seed=1)
    limits = {Format.INT: (-8.0, 7.0), Format.E4M3: (-448.0, 448.0), Format.E5M2: (-57344.0, 57344.0)}
    quant_min, quant_max = limits.get(format, (-6.0, 6.0))
    scale_formats = list(ScaleFormat)
    if format == Format.INT:
        scale_formats = scale_formats[: 1 if scheme == Scheme.ASYMMETRIC else 2]
    for scale_format in scale_formats:
        results = {}
        for backend in ("reference", "triton"):
            with ck.use_backend(backend):
                results[backend] = ck.choose_qparams(
                    low,
                    high,
                    scheme=scheme,
                    format=format,
                    quant_min=quant_min,
                    quant_max=quant_max,
                    scale_format=scale_format,
                )
        for got, wanted, what in zip(*results.values(), ("scale", "zero point", "minimum"), strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                assert_same_bits(wanted, got, what)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 7, 8, 1001, 5000])
def test_bits(bits: int, numel: int) -> None:
    values = torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    results = {}
    for backend in ("reference", "triton"):
        with ck.use_backend(backend):
            packed = ck.pack_bits(values, bits)
            both = [ck.unpack_bits(packed, bits, numel, signed=signed) for signed in (False, True)]
            results[backend] = [packed, *both]
    for got, wanted in zip(results["triton"], results["reference"], strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_masks(content: str, layout: str) -> None:
    turn = CONTENTS.index(content)
    for i, dtype in ((turn, DTYPES[turn % 4]), (turn + 1, DTYPES[(turn + len(layout)) % 4])):
        weight = Weight((4, 8, 3, 6), content, layout, dtype, seed=i)
        for n, m, axis in ((2, 4, 1), (1, 4, 0), (3, 6, 3), (1, 2, -1), (2, 3, 2), (5, 8, 1)):
            check_nm("triton", "cpu", weight, n, m, axis)
        for n, m in ((2, 4), (4, 8), (7, 8)):
            check_nm("triton", "cpu", Weight((6, 40), content, layout, dtype, seed=i), n, m, 1)
        for block_size in ((1, 8, 3, 6), (4, 1, 3, 6), (4, 8, 3, 1), (4, 8, 3, 6), (2, 1, 3, 2)):
            check_blocks("triton", "cpu", weight, 1, block_size)
        check_blocks("triton", "cpu", Weight((70, 40), content, layout, dtype, seed=i), 13, (70, 1))
        check_product("triton", "cpu", weight, Weight((4, 8, 3, 6), "special", "contiguous", dtype))


def test_random_calls(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    monkeypatch.setattr(test_backends_agree, "TESTED", "triton")
    with ck.use_backend("triton"):
        assert [random_calls.run(seed, blocks=8) for seed in range(4)] == [15] * 4
    assert tl.load is not load


def test_every_update_is_here() -> None:
    assert {step.update for step in STEPS} == set(RangeUpdate)
    assert {step.scheme for step in STEPS} == set(Scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block", "layout"), SHAPES)
def test_sampled_mask(shape: tuple[int, ...], block: object, layout: str, dtype: torch.dtype) -> None:
    check_sampled_mask("triton", shape, layout, dtype)


@pytest.mark.parametrize("has_low", [True, False], ids=["low", "symmetric"])
@pytest.mark.parametrize(("shape", "block", "layout"), SHAPES)
def test_learnable_range(shape: tuple[int, ...], block: tuple[int, ...], layout: str, has_low: bool) -> None:
    dtype = torch.float32 if has_low else torch.bfloat16
    check_learnable_range("triton", shape, block, layout, dtype, has_low)


@pytest.mark.parametrize("levels", [(-8.0, 7.0), (-128.0, 127.0), (0.0, 255.0), (-300.0, 300.0)])
def test_learnable_range_of_unusual_ranges(levels: tuple[float, float]) -> None:
    """Ranges with and without corrected products, and inputs on the edges between two levels."""
    spans = torch.tensor([0.0, 1e-41, 1e-30, 1e-17, 0.3, 1.0, 1e17, 1e30, float("inf"), float("nan")])[
        :, None
    ]
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(-700, 700, (10, 1100), generator=generator) / 2
    x = (
        halves
        * (spans / levels[1])
        * (1 + torch.randint(-2, 3, halves.shape, generator=generator) * 2.0**-23)
    )
    grad = torch.randn(x.shape, generator=generator)
    args = (grad, x, None, spans, [1, 1100], *levels)
    expected, actual = (
        on_backend(each, "learnable_range_backward", *args) for each in ("reference", "triton")
    )
    assert_same_bits(actual[0], expected[0], "gradient to the input")  # type: ignore[index]
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-4, atol=1e-3, equal_nan=True)  # type: ignore[index]


@pytest.mark.parametrize("kind", GPTQ_KINDS)
@pytest.mark.parametrize(("n", "rows", "groups"), [(1, 1, 1), (21, 67, 4), (4, 0, 1)])
def test_gptq_columns(n: int, rows: int, groups: int, kind: str) -> None:
    check_gptq_columns("triton", n, rows, groups, kind)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -0.0, 1e-41], ids=str)
def test_gptq_columns_of_unusual_values(special: float) -> None:
    check_gptq_columns("triton", 9, 5, 1, "zero_point", special=special)


@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("kind", ["plain", "zeros", "not finite"])
def test_by_reciprocal(kind: str, chooses: bool) -> None:
    x, gradient = (draw_for_reciprocal(kind, seed, 5, 48) for seed in (0, 1))
    check_by_reciprocal("triton", x, gradient, chooses, 4, run=24, is_symmetric=kind == "plain", eps=1e-6)


class WithoutFloat64(TorchDispatchMode):
    """Fails where an Intel GPU without float64 would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return result


@pytest.mark.parametrize(
    "sample", [key for key in SAMPLES if "triton" in library._functions[key.split(", ")[0]]]
)
def test_gpus_without_float64(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    name, args = sample.split(", ")[0], SAMPLES[sample]()
    again = copy.deepcopy(args)  # some operators write into their arguments
    with torch.no_grad():
        expected = library._functions[name]["reference"](*again)
        monkeypatch.setattr(wide, "has_float64", lambda device: False)
        with WithoutFloat64():
            found = library._functions[name]["triton"](*args)
    for a, b in zip(tree_leaves((found, args)), tree_leaves((expected, again)), strict=True):
        if isinstance(a, torch.Tensor) and name in INEXACT:
            torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
        elif isinstance(a, torch.Tensor) and not (name.startswith("foreach") and a.dtype == torch.uint8):
            assert_same_bits(a, b)  # between the masks of several tensors lies anything
