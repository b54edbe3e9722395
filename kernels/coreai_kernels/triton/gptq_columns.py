"""The inner loop of GPTQ on a GPU: a thread has a row of the weight, and takes its columns in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.triton.elementwise import dequantize_value, quantize_value
from coreai_kernels.triton.launch import launch

__all__ = ["gptq_columns"]

# Rows of a program, which is one warp: programs are few, and each is a chain of dependent steps.
_TILE = 32
# Errors that are read at a time, so that their latencies overlap.
_UNROLL = tl.constexpr(8)


@triton.jit
def _gptq_columns(
    columns,
    factor,
    scale,
    zero_point,
    minval,
    groups,
    output,
    errors,
    count,
    rows,
    low,
    high,
    FORMAT: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = row < rows
    here = row  # in 64 bits
    for column in range(count):
        shares = factor + column * count
        value = tl.load(columns + here, mask=valid, other=0.0)
        before = errors + row
        whole = column // _UNROLL * _UNROLL
        for start in range(0, whole, _UNROLL):
            for step in tl.static_range(_UNROLL):
                value -= tl.load(shares + start + step) * tl.load(before, mask=valid, other=0.0)
                before += rows
        for step in range(whole, column):
            value -= tl.load(shares + step) * tl.load(before, mask=valid, other=0.0)
            before += rows

        at = tl.load(groups + column) * rows + row
        own = tl.load(scale + at, mask=valid, other=1.0)
        zero = 0.0
        offset = 0.0
        if FORMAT == 0:
            if minval is not None:
                zero = low
                offset = tl.load(minval + at, mask=valid, other=0.0)
            elif zero_point is not None:
                zero = tl.load(zero_point + at, mask=valid, other=0).to(tl.float32)
        q, _ = quantize_value(value, own, zero, offset, low, high, FORMAT)
        left = value - dequantize_value(q, own, zero, offset, FORMAT)
        tl.store(output + here, value, mask=valid)
        tl.store(errors + here, tl.math.div_rn(left, tl.load(shares + column)), mask=valid)
        # The columns to come read the errors again, perhaps in another thread.
        tl.debug_barrier()
        here += rows


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
    """See ``reference/gptq_columns.py``."""
    columns, factor = columns.contiguous(), factor.contiguous()
    count, rows = columns.shape
    output, errors = torch.empty_like(columns), torch.empty_like(columns)
    if columns.numel():
        launch(
            _gptq_columns,
            triton.cdiv(rows, _TILE),
            columns,
            columns,
            factor,
            scale,
            zero_point,
            minval,
            torch.tensor(groups, device=columns.device),
            output,
            errors,
            count,
            rows,
            float(quant_min),
            float(quant_max),
            FORMAT=format,
            TILE=_TILE,
            warps=1,
        )
    return output, errors
