"""``gptq_columns``: the inner loop of GPTQ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference.gptq_columns import gptq_columns as reference
from coreai_kernels.triton import registry as triton

__all__ = ["MAX_COLUMNS", "gptq_columns"]

# As in csrc/cpu/kernels.h.
MAX_COLUMNS = 256


def _fake(columns: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty(columns.shape, device=columns.device), torch.empty(
        columns.shape, device=columns.device
    )


define(
    "gptq_columns",
    "(Tensor columns, Tensor factor, Tensor scale, Tensor? zero_point, Tensor? minval, int[] groups, "
    "int format, float quant_min, float quant_max) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    triton=triton.get("gptq_columns"),
)


def gptq_columns(
    columns: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minval: Tensor | None = None,
    *,
    groups: Sequence[int],
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
) -> tuple[Tensor, Tensor]:
    """Quantize columns of a weight one after another, the later ones making up for the errors of the earlier.

    Column ``j`` becomes ``w[j] - sum_i<j factor[j, i] * e[i]``, and its error is
    ``e[j] = (w[j] - fake_quantize(w[j])) / factor[j, j]`` (Frantar et al., GPTQ, arXiv 2210.17323,
    algorithm 1).

    Args:
        columns: float32 of shape ``[n, rows]``, ``n`` at most 256: one column of the weight a row.
        factor: float32 of shape ``[n, n]``, of which the lower triangle is read, with a diagonal that is not
            zero: the transpose of the upper Cholesky factor of the inverse Hessian.
        scale: float32 of shape ``[number of groups, rows]``.
        zero_point: int32, shape of ``scale``. Zero-point formulation.
        minval: float32, shape of ``scale``. Min-value formulation.
        groups: of each column, the row of ``scale`` that has its parameters.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        format: a :class:`coreai_kernels.Format`.

    Returns:
        The columns as they were before their own rounding, and the errors ``e``; both of the shape of
        ``columns``. ``fake_quantize`` of the former gives the quantized weight.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, a device, a group or the range is not allowed.
    """
    fmt = Format(format)
    for name, tensor in (("columns", columns), ("factor", factor), ("scale", scale)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {tensor.dtype}")
        if tensor.dim() != 2 or tensor.device != columns.device:
            raise ValueError(
                f"{name} must have two axes and be on the device of columns, {columns.device}; "
                f"got shape {tuple(tensor.shape)} on {tensor.device}"
            )
    n, rows = columns.shape
    if n > MAX_COLUMNS:
        raise ValueError(f"columns must be at most {MAX_COLUMNS} at a time; got {n}")
    if factor.shape != (n, n):
        raise ValueError(f"factor must have shape {(n, n)}; got {tuple(factor.shape)}")
    checks.check_range(fmt, quant_min, quant_max)
    checks.check_params((scale.shape[0], rows), columns, scale, zero_point, minval)
    if len(groups) != n or not all(0 <= each < scale.shape[0] for each in groups):
        raise ValueError(
            f"groups must have {n} entries, one a column, from 0 to {scale.shape[0] - 1}; got {list(groups)}"
        )
    return implementation("gptq_columns")(  # type: ignore[no-any-return]
        columns.detach(),
        factor.detach(),
        scale.detach().contiguous(),
        None if zero_point is None else zero_point.to(torch.int32).contiguous(),
        None if minval is None else minval.detach().contiguous(),
        list(groups),
        int(fmt),
        quant_min,
        quant_max,
    )
