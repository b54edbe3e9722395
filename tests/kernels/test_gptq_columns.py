"""The inner loop of GPTQ."""

from collections.abc import Iterator

import pytest
import torch

import coreai_kernels as ck
from tests.kernels.gptq_support import KINDS, SIZES, check_gptq_columns, job, run
from tests.kernels.support import assert_same_bits

ops = torch.ops.coreai_kernels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "rows", "groups"), SIZES)
def test_native_agrees(n: int, rows: int, groups: int, kind: str) -> None:
    check_gptq_columns("native", n, rows, groups, kind)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_agree() -> None:
    args = job(128, 1000, 4)
    for actual, expected in zip(run("native", args), run("reference", args), strict=True):
        assert_same_bits(actual, expected)


def test_errors_are_those_of_the_definition() -> None:
    # Each column, less what the errors before it ask for, in float64.
    columns, factor, scale, zero_point, _, groups, *_ = job(24, 10, 3)
    values, errors = ck.gptq_columns(
        columns, factor, scale, zero_point, groups=groups, quant_min=-8, quant_max=7
    )
    taken = torch.tril(factor, -1).double() @ errors.double()
    torch.testing.assert_close(values.double(), columns.double() - taken, rtol=1e-5, atol=1e-5)
    picked, zeros = scale[groups].double(), zero_point[groups].double()
    codes = ((values.double() / picked).round() + zeros).clamp(-8, 7)
    left = (values.double() - (codes - zeros) * picked) / factor.diagonal().double()[:, None]
    torch.testing.assert_close(errors.double(), left, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    torch.library.opcheck(ops.gptq_columns.default, job(6, 5, 2))


def test_errors() -> None:
    columns, factor, scale, zero_point, _, groups, *_ = job(6, 5, 2)
    rest = {"groups": groups, "quant_min": -8, "quant_max": 7}
    with pytest.raises(TypeError, match="factor must be float32"):
        ck.gptq_columns(columns, factor.double(), scale, zero_point, **rest)
    with pytest.raises(ValueError, match=r"factor must have shape \(6, 6\)"):
        ck.gptq_columns(columns, factor[:5], scale, zero_point, **rest)
    with pytest.raises(ValueError, match="groups must have 6 entries"):
        ck.gptq_columns(
            columns, factor, scale, zero_point, groups=[0, 0, 0, 1, 1, 2], quant_min=-8, quant_max=7
        )
    with pytest.raises(ValueError, match="scale must have one value per block"):
        ck.gptq_columns(columns, factor, scale[:, :4], zero_point, **rest)
    with pytest.raises(ValueError, match="at most 256"):
        ck.gptq_columns(torch.zeros(257, 1), torch.eye(257), scale, **rest)
