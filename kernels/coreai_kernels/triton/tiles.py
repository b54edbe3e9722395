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
    CORRECTED,
    EXACT,
    all_of,
    decode_fp8,
    dequantize_value,
    encode_fp8,
    fake_quantize_by_division,
    fake_quantize_by_product,
    for_products,
    fp32,
    has_short_bounds,
    inside_bits,
    narrow,
    one_each,
    quantize_value,
    suits_products,
)
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import Geometry, grid_index, power_of_two

__all__ = [
    "DEQUANTIZE",
    "FAKE_QUANTIZE",
    "QUANTIZE",
    "as_stored",
    "fake_quantize_tile",
    "load_valid",
    "run",
    "spread",
    "store_tile",
    "tile_elements",
    "unit_of",
]

FAKE_QUANTIZE, QUANTIZE, DEQUANTIZE = 0, 1, 2

# A grid's second axis is no longer than this.
_MOST_IN_Y = 65535

# How fp8 tensors travel: as bytes, because Triton knows e4m3 on sm_89 and later only.
_CODES = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}


@triton.jit
def spread(value, BY: tl.constexpr):
    """A value per row (1), column (2) or block of the middle axis (3), made to broadcast over a tile."""
    if BY == 1:
        value = value[:, None, None]
    elif BY == 2:
        value = value[None, :, :]
    elif BY == 3:
        value = value[None, :, None]
    return value


@triton.jit
def load_valid(pointer, valid, other=0.0):
    """What ``pointer`` points to; ``other`` where it does not exist. ``valid`` is None if all of it does."""
    if valid is None:
        x = tl.load(pointer)
    else:
        x = tl.load(pointer, mask=valid, other=other)
    return x


@triton.jit
def _parameters(scale, zero_point, minval, index, valid, low, FORMAT: tl.constexpr):
    """Scale, zero point and offset of the blocks ``index``; constants where there are none.

    Loaded in the shape of ``index``, to be spread over the tile afterwards: the compiler else gives the tile
    the layout of this load.
    """
    s = fp32(load_valid(scale + index, valid, 1.0))
    zp = 0.0
    off = 0.0
    if FORMAT == 0:
        if minval is not None:
            zp = low
            off = fp32(tl.load(minval + index, mask=valid))
        elif zero_point is not None:
            zp = load_valid(zero_point + index, valid, 0).to(tl.float32)
    return s, zp, off


@triton.jit
def _element(x, s, zp, off, low, high, FORMAT: tl.constexpr, OP: tl.constexpr, CODE: tl.constexpr):
    """An element quantized, or dequantized, in float32."""
    if OP == 2:
        if CODE == 0:
            q = fp32(x)
        else:
            q = decode_fp8(x, CODE == 2)
        y = dequantize_value(q, s, zp, off, FORMAT)
    else:
        y, _ = quantize_value(fp32(x), s, zp, off, low, high, FORMAT)
    return y


@triton.jit
def _stored(y, DTYPE: tl.constexpr, OP: tl.constexpr, CODE: tl.constexpr):
    if OP == 1 and CODE != 0:
        value = encode_fp8(y, CODE == 2)
    elif tl.int8 == DTYPE or tl.uint8 == DTYPE:
        value = tl.where(y == y, y, 0.0).to(tl.int32).to(DTYPE)
    else:
        value = narrow(y, DTYPE)
    return value


@triton.jit
def fake_quantize_tile(
    x,
    s,
    zp,
    off,
    low,
    high,
    finite,
    output,
    element,
    valid,
    mask,
    byte,
    valid_byte,
    FORMAT: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SHORT: tl.constexpr,
    EXACT_SCALES: tl.constexpr,
    BY: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Fake-quantize a tile, and store it and its mask. Where the scales allow, without divisions.

    Args:
        x: the elements, in their dtype.
        s: the scales.
        zp: zero points, or a number.
        off: offsets, or a number.
        low: lower bound of quantized values.
        high: upper bound.
        finite: of each scale, whether its elements are numbers all of them; None if that is not known.
        output: pointer to the result.
        element: positions from it, in any shape.
        valid: which of them exist; None if all do.
        mask: pointer to the packed mask, or None.
        byte: positions from it, in the shape of groups of 8 elements.
        valid_byte: which of them exist; None if all do.
        FORMAT: of the quantized values.
        HAS_ZERO_POINT: whether ``zp`` has a value for each scale.
        HAS_OFFSET: whether ``off`` is taken from the elements.
        SHORT: see :func:`coreai_kernels.triton.elementwise.has_short_bounds`.
        EXACT_SCALES: whether the scales are powers of two.
        BY: how parameters are spread, or 0 if they are the whole tile's.
        WHOLE: whether the elements of a byte of the mask all exist, where one does.
    """
    x = fp32(x)  # ahead of the branch, where the compiler sees both halves of a register
    ZP_BY: tl.constexpr = BY if HAS_ZERO_POINT else 0
    OFFSET_BY: tl.constexpr = BY if HAS_OFFSET else 0
    # 0: divide; 1: where the scales do not allow products; 2: never.
    DIVIDE: tl.constexpr = 0 if not SHORT else (2 if EXACT_SCALES else 1)
    if DIVIDE != 0:
        PRODUCT: tl.constexpr = EXACT if EXACT_SCALES else CORRECTED
        unit, reciprocal, low_units, high_units = for_products(s, zp, low, high, FORMAT, PRODUCT)
        suits = suits_products(s, zp, low, high, HAS_ZERO_POINT)
        if finite is not None:
            suits = suits & finite
        if len(suits.shape) > 0:
            suits = all_of(suits)
        if BY == 3:
            unit, reciprocal = one_each(unit), one_each(reciprocal)
        if ZP_BY == 3:
            low_units, high_units = one_each(low_units), one_each(high_units)
        if DIVIDE == 2 or suits:
            y, ones = fake_quantize_by_product(
                x,
                spread(unit, BY),
                spread(reciprocal, BY),
                spread(off, OFFSET_BY),
                spread(low_units, ZP_BY),
                spread(high_units, ZP_BY),
                FORMAT,
                HAS_OFFSET,
                PRODUCT,
                finite is not None,
            )
            store_tile(y, ones, output, element, valid, mask, byte, valid_byte, WHOLE)
        else:
            y, inside = fake_quantize_by_division(
                x, spread(s, BY), spread(zp, ZP_BY), spread(off, OFFSET_BY), low, high, FORMAT
            )
            store_tile(y, inside, output, element, valid, mask, byte, valid_byte, WHOLE)
    else:
        y, inside = fake_quantize_by_division(
            x, spread(s, BY), spread(zp, ZP_BY), spread(off, OFFSET_BY), low, high, FORMAT
        )
        store_tile(y, inside, output, element, valid, mask, byte, valid_byte, WHOLE)


@triton.jit
def store_tile(y, inside, output, element, valid, mask, byte, valid_byte, WHOLE: tl.constexpr):
    """The end of :func:`fake_quantize_tile`: store the results and their mask."""
    y = tl.reshape(narrow(y, output.dtype.element_ty), element.shape)
    tl.store(output + element, y, mask=valid)
    if mask is not None:
        if not WHOLE:
            inside = tl.where(valid, inside, 0)
        inside = tl.reshape(inside, byte.shape + [8])
        whole = output.dtype.element_ty.primitive_bitwidth <= 16
        tl.store(mask + byte, inside_bits(inside, whole), mask=valid_byte)


@triton.jit(do_not_specialize=["numel", "sizes", "strides"], do_not_specialize_on_alignment=["mask"])
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
    SHORT: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * TILE
    group = tl.arange(0, TILE // 8)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    left = tl.minimum(numel.to(tl.int64) * UNIT - start, TILE).to(tl.int32)
    valid_group = group * 8 < left
    if UNIT == TILE:
        valid_group = None
        valid = None
    elif UNIT == 8:
        valid = tl.broadcast_to(valid_group[:, None], (TILE // 8, 8))
    else:
        valid = element < left
    x = load_valid(input + start + element, valid)
    if LEVELS == 0:
        s, zp, off = _parameters(scale, zero_point, minval, 0, None, low, FORMAT)
    else:
        if WIDE:
            index = grid_index(start + element, sizes, strides, LEVELS)
        else:
            index = grid_index(start.to(tl.int32) + element, sizes, strides, LEVELS)
        s, zp, off = _parameters(scale, zero_point, minval, index, valid, low, FORMAT)
    if OP == 0:
        bits = mask
        if mask is not None:
            bits = mask + start // 8
        fake_quantize_tile(
            x,
            s,
            zp,
            off,
            low,
            high,
            None,
            output + start,
            element,
            valid,
            bits,
            group,
            valid_group,
            FORMAT,
            FORMAT == 0 and minval is None and zero_point is not None,
            FORMAT == 0 and minval is not None,
            SHORT and LEVELS == 0,
            False,
            0,
            UNIT != 1,
        )
    else:
        y = _element(x, s, zp, off, low, high, FORMAT, OP, CODE)
        tl.store(output + start + element, _stored(y, output.dtype.element_ty, OP, CODE), mask=valid)


@triton.jit(
    do_not_specialize=["rows", "columns_by_8", "sizes", "strides"], do_not_specialize_on_alignment=["mask"]
)
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
    SHORT: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    EVEN: tl.constexpr,
    IN_ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    group = tl.arange(0, COLUMNS // 8)
    column = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    valid_row = row < tl.minimum(rows - first_row, ROWS).to(tl.int32)
    if FULL:
        first_column = 0
        columns_left = COLUMNS
        start = first_row * COLUMNS
        # One run of memory: its positions take fewer instructions than those of rows.
        byte = tl.arange(0, ROWS * COLUMNS // 8)
        element = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        valid_byte = byte < (rows - first_row) * (COLUMNS // 8)
    else:
        # Passed as an eighth, so that the compiler knows the rows to be aligned.
        columns = columns_by_8.to(tl.int64) * 8
        first_column = tl.program_id(1) * COLUMNS
        columns_left = tl.minimum(columns - first_column, COLUMNS).to(tl.int32)
        start = first_row * columns + first_column
        valid_byte = (group * 8 < columns_left)[None, :]
        # Within a tile 32 bits do: rows are longer than a tile only when there is one of them.
        if ROWS == 1:
            element = column[None, :, :]
            byte = group[None, :]
        else:
            element = row[:, None, None] * (columns_by_8 * 8) + column[None, :, :]
            byte = row[:, None] * columns_by_8 + group[None, :]
            valid_byte = valid_row[:, None] & valid_byte
    valid_column = column < columns_left
    if EVEN:  # tiles cover the rows and columns without a rest
        valid = None
        valid_byte = None
        valid_row = None
        valid_column = None
    else:
        valid = tl.broadcast_to(tl.expand_dims(valid_byte, -1), valid_byte.shape + [8])
    x = tl.reshape(load_valid(input + start + element, valid), (ROWS, COLUMNS // 8, 8))
    if not WIDE:
        first_row = first_row.to(tl.int32)
    if ROWS == 1:
        position = first_row
    else:
        position = first_row + row
    if IN_ORDER:
        index = position
    else:
        index = grid_index(position, sizes, strides, LEVELS)
    BY: tl.constexpr = (
        0 if (BY_COLUMN and LEVELS > 0) or (not BY_COLUMN and ROWS == 1) else (2 if BY_COLUMN else 1)
    )
    if BY_COLUMN:
        of_column = (first_column + column) * column_stride
        if LEVELS == 0:
            s, zp, off = _parameters(scale, zero_point, minval, of_column, valid_column, low, FORMAT)
        else:
            index = index + tl.zeros((ROWS,), tl.int32)
            index = index[:, None, None] + of_column[None, :, :]
            s, zp, off = _parameters(scale, zero_point, minval, index, valid, low, FORMAT)
    elif ROWS == 1:
        s, zp, off = _parameters(scale, zero_point, minval, index, None, low, FORMAT)
    else:
        s, zp, off = _parameters(scale, zero_point, minval, index, valid_row, low, FORMAT)
    if OP == 0:
        bits = mask
        if mask is not None:
            bits = mask + start // 8
        fake_quantize_tile(
            x,
            s,
            zp,
            off,
            low,
            high,
            None,
            output + start,
            element,
            valid,
            bits,
            byte,
            valid_byte,
            FORMAT,
            FORMAT == 0 and minval is None and zero_point is not None,
            FORMAT == 0 and minval is not None,
            SHORT and not (BY_COLUMN and LEVELS > 0),
            False,
            BY,
            True,
        )
    else:
        zero_points = spread(zp, BY if FORMAT == 0 and minval is None and zero_point is not None else 0)
        offsets = spread(off, BY if FORMAT == 0 and minval is not None else 0)
        y = _element(x, spread(s, BY), zero_points, offsets, low, high, FORMAT, OP, CODE)
        y = tl.reshape(_stored(y, output.dtype.element_ty, OP, CODE), element.shape)
        tl.store(output + start + element, y, mask=valid)


def tile_elements(numel: int, element_size: int) -> int:
    """Elements for a program of 128 threads.

    Four loads of 16 bytes a thread keep enough memory traffic in flight; below a million elements one or two,
    so that the work spreads over all multiprocessors.
    """
    full = 2048 if element_size >= 4 else 4096
    return full if numel >= 1 << 20 else max(full // 4, 512)


def unit_of(size: int, tile: int = 1) -> int:
    """``tile``, 8 or 1: what to pass a size in, so that the kernel is compiled once and knows its divisor.

    Most sizes are kept from Triton's own specialization, which would compile anew for every combination of
    sizes that 16 divides.
    """
    unit = 8 if size % 8 == 0 else 1
    return tile if tile > unit and size % tile == 0 else unit


@functools.lru_cache(maxsize=8192)
def _plan(
    geometry: Geometry, element_size: int
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Kernel, grid of programs, arguments and constants that shape and blocks determine."""
    numel = geometry.numel
    tile = tile_elements(numel, element_size)
    levels = geometry.levels
    too_wide = triton.cdiv(levels[-1][0], 64) > _MOST_IN_Y if levels else False
    if geometry.blocks == 1 or levels[-1][0] % 8 or too_wide:
        sizes, strides = geometry.inner_first()
        unit = unit_of(numel, tile)
        constants = {
            "LEVELS": len(sizes) if geometry.blocks > 1 else 0,
            "WIDE": geometry.wide,
            "UNIT": unit,
            "TILE": tile,
        }
        return _flat, (triton.cdiv(numel, tile),), (numel // unit, sizes, strides), constants
    columns, stride = levels[-1]
    by_column = stride != 0
    sizes, strides = geometry.inner_first(skip=1)
    # A tile of many rows reads the parameters of its columns once. 64 columns: fewer values than threads, so
    # that each thread loads what it needs; for more the compiler goes through shared memory.
    width = min(power_of_two(columns), 64 if by_column else tile)
    rows = numel // columns
    height = min(tile // width, power_of_two(rows))
    constants = {
        "LEVELS": 0 if by_column and not any(strides) else len(sizes),
        "BY_COLUMN": by_column,
        "WIDE": geometry.wide,
        "FULL": width == columns and not by_column,
        "EVEN": rows % height == 0 and columns % width == 0,
        "IN_ORDER": not by_column and strides == (1,),
        "ROWS": height,
        "COLUMNS": width,
    }
    programs = (triton.cdiv(rows, height), triton.cdiv(columns, width))
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
    # Twice as many elements a thread share parameters and positions: fewer instructions, and as many bytes
    # under way, at the price of occupancy. Where each element finds its own block, registers do not suffice.
    size = constants["ROWS"] * constants["COLUMNS"] if kernel is _rows else constants["TILE"]
    halves = op == FAKE_QUANTIZE and size >= 2048 and (kernel is _rows or constants["LEVELS"] == 0)
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
        SHORT=has_short_bounds(format, quant_min, quant_max),
        warps=2 if halves else 4,
        **constants,
    )
