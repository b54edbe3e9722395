"""The backend that tensors choose by themselves gives the reference's bits.

FUZZ_CALLS: random calls a test (default 250); ``make fuzz`` takes many.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coreai_kernels as ck
from coreai_kernels import Format, RangeUpdate, ScaleFormat, Scheme
from tests.kernels.support import Case, assert_same_bits, assert_same_memory_format, cases

pytestmark = pytest.mark.usefixtures("isa")
TESTED = "auto"  # random_calls.py takes others
many = settings(max_examples=int(os.environ.get("FUZZ_CALLS", "250")), deadline=None)


def params_of(case: Case, formulation: str) -> dict[str, torch.Tensor]:
    """Valid parameters, with a few hostile ones among them."""
    generator = torch.Generator().manual_seed(case.seed)
    scale = (torch.rand(case.grid, generator=generator) + 0.01) * case.magnitude
    params = {"scale": scale}
    if case.format == Format.INT and formulation == "zero_point":
        low, high = int(case.quant_min), int(case.quant_max)
        params["zero_point"] = torch.randint(low, high + 1, case.grid, generator=generator, dtype=torch.int32)
    if case.format == Format.INT and formulation == "minval":
        params["minval"] = -torch.rand(case.grid, generator=generator) * case.magnitude
    if case.special and scale.numel() > 2:
        scale.view(-1)[0], scale.view(-1)[1] = float("inf"), float("nan")
    return params


formulations = st.sampled_from(["zero_point", "minval", "none"])


@many
@given(cases(), formulations)
def test_fake_quantize(case: Case, formulation: str) -> None:
    params = params_of(case, formulation)
    gradient = case.tensor(seed=1)
    results = {}
    for backend in ("reference", TESTED):
        x = case.tensor().detach().requires_grad_()
        with ck.use_backend(backend):
            y = ck.fake_quantize(x, **params, **case.quant)
            y.backward(gradient)
            plain = ck.fake_quantize(x.detach(), **params, **case.quant)
        assert_same_bits(plain, y.detach(), "without and with gradient")
        results[backend] = (y.detach(), x.grad)
    for got, wanted, what in zip(results[TESTED], results["reference"], ("output", "gradient"), strict=True):
        assert_same_bits(got, wanted, what)
        assert_same_memory_format(got, wanted)
    assert_same_memory_format(results[TESTED][0], torch.empty_like(case.tensor()))


@many
@given(cases())
def test_observe_range(case: Case) -> None:
    if 0 in case.shape:
        return
    with ck.use_backend("reference"):
        wanted = ck.observe_range(case.tensor(), block_size=case.block_size)
    got = ck.observe_range(case.tensor(), block_size=case.block_size)
    assert_same_bits(got[0], wanted[0], "minimum")
    assert_same_bits(got[1], wanted[1], "maximum")


@many
@given(cases(), st.sampled_from(list(Scheme)), st.sampled_from(list(ScaleFormat)))
def test_choose_qparams(case: Case, scheme: Scheme, scale_format: ScaleFormat) -> None:
    low, high = case.tensor(), case.tensor(seed=1)
    arguments = {"scheme": scheme, "scale_format": case.suited(scale_format, scheme)}
    arguments |= {name: case.quant[name] for name in ("format", "quant_min", "quant_max")}
    with ck.use_backend("reference"):
        wanted = ck.choose_qparams(low, high, **arguments)
    got = ck.choose_qparams(low, high, **arguments)
    for a, b, what in zip(got, wanted, ("scale", "zero point", "minimum"), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b, what)


@many
@given(
    cases(),
    st.sampled_from(list(Scheme)),
    st.sampled_from(list(RangeUpdate)),
    st.booleans(),
    st.sampled_from(list(ScaleFormat)),
    st.sampled_from([(None, None), (-0.7, None), (None, 1.3), (-2.0, 0.3)]),
)
def test_observe_and_fake_quantize(
    case: Case,
    scheme: Scheme,
    update: RangeUpdate,
    use_minval: bool,
    scale_format: ScaleFormat,
    fixed: tuple[float | None, float | None],
) -> None:
    results = {}
    for backend in ("reference", TESTED):
        is_int = case.format == Format.INT
        state = {"scale": torch.zeros(case.grid)}
        if is_int:
            state |= {
                "zero_point": torch.zeros(case.grid, dtype=torch.int32),
                "minval": torch.zeros(case.grid),
            }
        if update != RangeUpdate.LATEST:
            state |= {
                name: torch.zeros(case.grid, dtype=case.dtype) for name in ("running_min", "running_max")
            }
        found = []
        for step in range(3):
            x = case.tensor(seed=step).detach().requires_grad_()
            with ck.use_backend(backend):
                y = ck.observe_and_fake_quantize(
                    x,
                    **state,
                    **case.quant,
                    scheme=scheme,
                    update=update,
                    has_running=step > 0,
                    averaging_constant=0.1,
                    use_minval=use_minval and is_int,
                    scale_format=case.suited(scale_format, scheme),
                    range_min=fixed[0],
                    range_max=fixed[1],
                )
                y.backward(case.tensor(seed=10 + step))
            found += [y.detach(), x.grad, *(value.clone() for value in state.values())]
        results[backend] = found
    names = ["output", "gradient", *state] * 3
    for got, wanted, what in zip(results[TESTED], results["reference"], names, strict=True):
        assert_same_bits(got, wanted, what)


@many
@given(cases(), formulations, st.data())
def test_quantize_and_dequantize(case: Case, formulation: str, data: st.DataObject) -> None:
    params = params_of(case, formulation)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if case.format == Format.INT:
        dtypes += [torch.int8] if case.quant_max <= 127 else []
        dtypes += [torch.uint8] if case.quant_min >= 0 else []
    if case.format in (Format.E4M3, Format.E2M1):
        dtypes.append(torch.float8_e4m3fn)
    if case.format == Format.E5M2:
        dtypes.append(torch.float8_e5m2)
    dtype = data.draw(st.sampled_from(dtypes))
    target = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    without_max = {name: case.quant[name] for name in ("block_size", "format", "quant_min")}
    results = {}
    for backend in ("reference", TESTED):
        with ck.use_backend(backend):
            q = ck.quantize(case.tensor(), **params, **case.quant, dtype=dtype)
            results[backend] = (q, ck.dequantize(q, **params, **without_max, dtype=target))
    assert_same_bits(results[TESTED][0], results["reference"][0], "quantized")
    assert_same_bits(results[TESTED][1], results["reference"][1], "dequantized")
    assert_same_memory_format(results[TESTED][0], torch.empty_like(case.tensor()))


@many
@given(st.integers(1, 8), st.integers(0, 300), st.booleans(), st.integers(0, 99))
def test_bits(bits: int, numel: int, signed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    values = torch.randint(low, high, (numel,), generator=generator).to(torch.int8 if signed else torch.uint8)
    with ck.use_backend("reference"):
        wanted = ck.pack_bits(values, bits)
        assert torch.equal(ck.unpack_bits(wanted, bits, numel, signed=signed), values)
    packed = ck.pack_bits(values, bits)
    assert torch.equal(packed, wanted)
    assert torch.equal(ck.unpack_bits(packed, bits, numel, signed=signed), values)
