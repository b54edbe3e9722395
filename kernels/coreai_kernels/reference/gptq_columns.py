"""The inner loop of GPTQ: columns are quantized in order, and their errors move on to the columns behind."""

import torch
from torch import Tensor

from coreai_kernels.reference.fake_quantize import forward

__all__ = ["gptq_columns"]


def gptq_columns(
    columns: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    groups: list[int],
    format: int,
    quant_min: float,
    quant_max: float,
) -> tuple[Tensor, Tensor]:
    """Lines 3 to 7 of algorithm 1 of Frantar et al., arXiv 2210.17323, for one block of columns.

    Products and differences are rounded one by one, in the order of the columns.
    """
    values = columns.contiguous().clone()
    errors = torch.empty_like(values)
    for j, group in enumerate(groups):
        own = slice(group, group + 1)
        column = values[j : j + 1]
        rounded, _ = forward(
            column,
            scale[own],
            None if zero_point is None else zero_point[own],
            None if minval is None else minval[own],
            (1, 1),
            format,
            quant_min,
            quant_max,
            False,
        )
        errors[j] = (column - rounded)[0] / factor[j, j]
        values[j + 1 :] -= factor[j + 1 :, j, None] * errors[j]
    return values, errors
