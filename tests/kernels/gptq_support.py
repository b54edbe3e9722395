"""Problems for ``gptq_columns``, and the comparison of two backends."""

import torch
from torch import Tensor

import coreai_kernels as ck
from coreai_kernels import Format
from coreai_kernels.ops.library import implementation
from tests.kernels.support import assert_same_bits

__all__ = ["KINDS", "SIZES", "check_gptq_columns", "job", "run"]

KINDS = ["zero_point", "minval", "e2m1"]
# Columns, rows, groups of columns.
SIZES = [(1, 1, 1), (5, 3, 2), (32, 64, 1), (128, 67, 4), (256, 130, 8), (0, 4, 1), (4, 0, 1)]


def job(n: int, rows: int, groups: int, kind: str = "zero_point", seed: int = 0) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(n, rows, generator=generator)
    factor = torch.randn(n, n, generator=generator).tril() / 4
    factor.diagonal().copy_(torch.rand(n, generator=generator) + 0.5)
    scale = torch.rand(groups, rows, generator=generator) * 0.3 + 0.05
    zero_point = torch.randint(-3, 3, (groups, rows), generator=generator, dtype=torch.int32)
    minval = -torch.rand(groups, rows, generator=generator)
    of_columns = [i * groups // n for i in range(n)]
    if kind == "e2m1":
        return columns, factor, scale, None, None, of_columns, int(Format.E2M1), -6.0, 6.0
    given = (zero_point, None) if kind == "zero_point" else (None, minval)
    return columns, factor, scale, *given, of_columns, int(Format.INT), -8.0, 7.0


def run(backend: str, args: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    with ck.use_backend(backend):  # type: ignore[arg-type]
        return implementation("gptq_columns")(*args)  # type: ignore[no-any-return]


def check_gptq_columns(
    backend: str,
    n: int,
    rows: int,
    groups: int,
    kind: str,
    *,
    special: float | None = None,
    device: str = "cpu",
) -> None:
    """Compare with the reference; ``special`` is the first element of the weight."""
    args = job(n, rows, groups, kind)
    if special is not None:
        args[0].view(-1)[0] = special  # type: ignore[attr-defined]
    given = tuple(each.to(device) if isinstance(each, Tensor) else each for each in args)
    for actual, expected in zip(run(backend, given), run("reference", given), strict=True):
        assert_same_bits(actual, expected)
