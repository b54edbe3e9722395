"""The two kernels that quantize, dequantize or do both, element by element, with parameters given.

``_rows`` takes tensors whose innermost level has a multiple of 8 elements: a tile of rows by columns needs
its parameters once a row (blocks are runs of memory) or once a column (channels are innermost). ``_flat``
takes all others, and tensors of one block: each element finds its own block.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.triton.elementwise import (
    decode_fp8,
    dequantize_value,
    encode_fp8,
    fp32,
    inside_bits,
    narrow,
    quantize_value,
)
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import Geometry, grid_index, power_of_two

__all__ = ["DEQUANTIZE", "FAKE_QUANTIZE", "QUANTIZE", "as_stored", "run", "tile_elements", "unit_of"]

FAKE_QUANTIZE, QUANTIZE, DEQUANTIZE = 0, 1, 2

# How fp8 tensors travel: as bytes, because Triton knows e4m3 on sm_89 and later only.
_CODES = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


@triton.jit
def _spread(value, BY: tl.constexpr):
    """A value per row (1) or per column (2) of a tile, made to broadcast over it."""
    if BY == 1:
        value = value[:, None, None]
    elif BY == 2:
        value = value[None, :, :]
    return value


@triton.jit
def _parameters(scale, zero_point, minval, index, valid, low, FORMAT: tl.constexpr, BY: tl.constexpr):
    """Scale, zero point and offset of the blocks ``index``; constants where there are none.

    Loaded in the shape of ``index`` and spread over the tile afterwards: the compiler else gives the tile the
    layout of this load.
    """
    s = _spread(fp32(tl.load(scale + index, mask=valid)), BY)
    zp = 0.0
    off = 0.0
    if FORMAT == 0:
        if minval is not None:
            zp = low
            off = _spread(fp32(tl.load(minval + index, mask=valid)), BY)
        elif zero_point is not None:
            zp = _spread(tl.load(zero_point + index, mask=valid).to(tl.float32), BY)
    return s, zp, off


@triton.jit
def _element(x, s, zp, off, low, high, FORMAT: tl.constexpr, OP: tl.constexpr, CODE: tl.constexpr):
    """float32 result, and whether the quantized value was inside the range."""
    if OP == 2:
        if CODE == 0:
            q = fp32(x)
        else:
            q = decode_fp8(x, CODE == 2)
        y = dequantize_value(q, s, zp, off, FORMAT)
        inside = q == q
    else:
        y, inside = quantize_value(fp32(x), s, zp, off, low, high, FORMAT)
        if OP == 0:
            y = dequantize_value(y, s, zp, off, FORMAT)
    return y, inside


@triton.jit
def _stored(y, DTYPE: tl.constexpr, OP: tl.constexpr, CODE: tl.constexpr):
    if OP == 1 and CODE != 0:
        value = encode_fp8(y, CODE == 2)
    elif tl.int8 == DTYPE or tl.uint8 == DTYPE:
        value = tl.where(y == y, y, 0.0).to(tl.int32).to(DTYPE)
    else:
        value = narrow(y, DTYPE)
    return value


@triton.jit(do_not_specialize=["numel", "sizes", "strides"])
def _flat(
    input,
    output,
    mask,
    scale,
    zero_point,
    minval,
    numel,
    sizes,
    strides,
    low,
    high,
    LEVELS: tl.constexpr,
    FORMAT: tl.constexpr,
    OP: tl.constexpr,
    CODE: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * TILE
    group = tl.arange(0, TILE // 8)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = numel.to(tl.int64) * UNIT - start
    valid = element < left
    x = tl.load(input + start + element, mask=valid, other=0.0)
    if LEVELS == 0:
        s, zp, off = _parameters(scale, zero_point, minval, 0, None, low, FORMAT, 0)
    else:
        if WIDE:
            index = grid_index(start + element, sizes, strides, LEVELS)
        else:
            index = grid_index(start.to(tl.int32) + element, sizes, strides, LEVELS)
        s, zp, off = _parameters(scale, zero_point, minval, index, valid, low, FORMAT, 0)
    y, inside = _element(x, s, zp, off, low, high, FORMAT, OP, CODE)
    tl.store(output + start + element, _stored(y, output.dtype.element_ty, OP, CODE), mask=valid)
    if mask is not None:
        tl.store(mask + start // 8 + group, inside_bits(inside & valid), mask=group * 8 < left)


@triton.jit(do_not_specialize=["rows", "columns_by_8", "sizes", "strides"])
def _rows(
    input,
    output,
    mask,
    scale,
    zero_point,
    minval,
    rows,
    columns_by_8,
    column_stride,
    sizes,
    strides,
    low,
    high,
    LEVELS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    FORMAT: tl.constexpr,
    OP: tl.constexpr,
    CODE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Passed as an eighth, so that the compiler knows the rows to be aligned.
    columns = columns_by_8.to(tl.int64) * 8
    chunks = tl.cdiv(columns_by_8, COLUMNS // 8)
    program = tl.program_id(0)
    first_row = (program // chunks).to(tl.int64) * ROWS
    first_column = (program % chunks).to(tl.int64) * COLUMNS
    start = first_row * columns + first_column
    row = tl.arange(0, ROWS)
    group = tl.arange(0, COLUMNS // 8)
    column = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    valid_row = row < rows - first_row
    columns_left = columns - first_column
    valid = valid_row[:, None, None] & (column < columns_left)[None, :, :]
    # Within a tile 32 bits do: rows are longer than a tile only when there is one of them.
    if ROWS == 1:
        element = column[None, :, :]
        byte = group[None, :]
    else:
        element = row[:, None, None] * (columns_by_8 * 8) + column[None, :, :]
        byte = row[:, None] * columns_by_8 + group[None, :]
    x = tl.load(input + start + element, mask=valid, other=0.0)
    if WIDE:
        index = grid_index(first_row + row, sizes, strides, LEVELS)
    else:
        index = grid_index(first_row.to(tl.int32) + row, sizes, strides, LEVELS)
    if BY_COLUMN:
        of_column = (first_column.to(tl.int32) + column) * column_stride
        if LEVELS == 0:
            valid_column = column < columns_left
            s, zp, off = _parameters(scale, zero_point, minval, of_column, valid_column, low, FORMAT, 2)
        else:
            index = index[:, None, None] + of_column[None, :, :]
            s, zp, off = _parameters(scale, zero_point, minval, index, valid, low, FORMAT, 0)
    else:
        s, zp, off = _parameters(scale, zero_point, minval, index, valid_row, low, FORMAT, 1)
    y, inside = _element(x, s, zp, off, low, high, FORMAT, OP, CODE)
    tl.store(output + start + element, _stored(y, output.dtype.element_ty, OP, CODE), mask=valid)
    if mask is not None:
        valid_byte = valid_row[:, None] & (group * 8 < columns_left)[None, :]
        tl.store(mask + start // 8 + byte, inside_bits(inside), mask=valid_byte)


def tile_elements(numel: int, element_size: int) -> int:
    """Elements for a program of 128 threads.

    Four loads of 16 bytes a thread keep enough memory traffic in flight; below a million elements one or two,
    so that the work spreads over all multiprocessors.
    """
    full = 2048 if element_size >= 4 else 4096
    return full if numel >= 1 << 20 else max(full // 4, 512)


def unit_of(size: int) -> int:
    """8 or 1: what to pass a size in, so that the kernel is compiled once and knows whether 8 divides it.

    Most sizes are kept from Triton's own specialization, which would compile anew for every combination of
    sizes that 16 divides.
    """
    return 8 if size % 8 == 0 else 1


@functools.lru_cache(maxsize=8192)
def _plan(geometry: Geometry, element_size: int) -> tuple[Any, int, tuple[Any, ...], dict[str, Any]]:
    """Kernel, number of programs, arguments and constants that shape and blocks determine."""
    numel = geometry.numel
    tile = tile_elements(numel, element_size)
    levels = geometry.levels
    if geometry.blocks == 1 or levels[-1][0] % 8:
        sizes, strides = geometry.inner_first()
        unit = unit_of(numel)
        constants = {
            "LEVELS": len(sizes) if geometry.blocks > 1 else 0,
            "WIDE": geometry.wide,
            "UNIT": unit,
            "TILE": tile,
        }
        return _flat, triton.cdiv(numel, tile), (numel // unit, sizes, strides), constants
    columns, stride = levels[-1]
    by_column = stride != 0
    sizes, strides = geometry.inner_first(skip=1)
    if by_column:
        tile = min(tile, 2048)
    # A tile of many rows reads the parameters of its columns once. 64 columns: fewer values than threads, so
    # that each thread loads what it needs; for more the compiler goes through shared memory.
    width = min(power_of_two(columns), 64 if by_column else tile)
    rows = numel // columns
    height = min(tile // width, power_of_two(rows))
    constants = {
        "LEVELS": 0 if by_column and not any(strides) else len(sizes),
        "BY_COLUMN": by_column,
        "WIDE": geometry.wide,
        "ROWS": height,
        "COLUMNS": width,
    }
    programs = triton.cdiv(rows, height) * triton.cdiv(columns, width)
    return _rows, programs, (rows, columns // 8, stride, sizes, strides), constants


def as_stored(x: Tensor) -> tuple[Tensor, int]:
    """The tensor as the kernels see it, and which fp8 format its bytes are (0: none)."""
    code = _CODES.get(x.dtype, 0)
    return (x.view(torch.uint8), code) if code else (x, 0)


def run(
    op: int,
    geometry: Geometry,
    input: Tensor,
    output: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    format: int,
    quant_min: float,
    quant_max: float,
) -> None:
    """Write ``output`` (and ``mask``) from a dense ``input`` of the same memory format."""
    if geometry.numel == 0:
        return
    kernel, programs, shape, constants = _plan(geometry, max(input.element_size(), output.element_size()))
    input, code = as_stored(input)
    if op == QUANTIZE:
        output, code = as_stored(output)
    launch(
        kernel,
        programs,
        output,
        input,
        output,
        mask,
        scale.contiguous(),
        zero_point.contiguous() if zero_point is not None and format == Format.INT else None,
        minval.contiguous() if minval is not None and format == Format.INT else None,
        *shape,
        float(quant_min),
        float(quant_max),
        FORMAT=int(format),
        OP=op,
        CODE=code,
        warps=4,
        **constants,
    )
