"""``observe_and_fake_quantize`` and its in-place form: the whole training step of a fake quantizer.

Three ways, by the size and place of the blocks:

- a block that fits the registers of a program: one launch, one read (``_register_tile``);
- one large block, the whole tensor: two launches, a reduction and a quantization whose programs each finish
  the reduction for themselves (``one_block.py``), which saves the third;
- other large or oddly shaped blocks, and scales of two levels: reduction, finish, quantization.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.quant_config import QuantConfig
from coreai_kernels.reference.observe_and_fake_quantize import next_range
from coreai_kernels.triton import tiles
from coreai_kernels.triton.elementwise import block_range, fp32, is_finite, one_each
from coreai_kernels.triton.fake_quantize import empty_mask
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import Geometry, TileShape, dense, geometry_of, grid_index, power_of_two
from coreai_kernels.triton.observe_range import observe, observe_range, reduce_blocks
from coreai_kernels.triton.one_block import quantize_one_block
from coreai_kernels.triton.qparams import choose_qparams, constants_of, finish, numbers_of, tl_dtype
from coreai_kernels.types import RangeUpdate

__all__ = ["observe_and_fake_quantize", "observe_and_fake_quantize_", "register_tile", "register_tile_plan"]

# Bytes of the largest block that one program holds: 64 float32 registers in each of 512 threads for a run of
# memory; half of that where every thread also keeps parameters of several columns.
_LARGEST_RUN = 128 * 1024
_LARGEST_BLOCK = 64 * 1024

# Elements of the largest run of memory that has both ways to divide: 64 of each of 256 threads. With 512
# threads the compiler runs out of registers on some GPUs.
_MOST_BY_PRODUCTS = tl.constexpr(16384)
_E8M0 = tl.constexpr(int(ScaleFormat.E8M0))

State = tuple[Tensor | None, ...]


@triton.jit
def _over_depth(low, high, SHAPE: tl.constexpr):
    """Ranges of the blocks, from those of their pieces.

    A thread merges the pieces that it has; then threads exchange, so that few values are left for each to
    merge with other threads'.
    """
    if SHAPE.pieces > 1:
        low = tl.reshape(low, (SHAPE.pieces, SHAPE.depth // SHAPE.pieces, SHAPE.blocks))
        high = tl.reshape(high, (SHAPE.pieces, SHAPE.depth // SHAPE.pieces, SHAPE.blocks))
        low, high = block_range(low, high, 0)
    if SHAPE.depth > SHAPE.pieces and SHAPE.blocks > 1:
        low, high = one_each(low), one_each(high)
    low, high = block_range(low, high, 0)
    if SHAPE.blocks > 1:
        low, high = one_each(low), one_each(high)
    return low, high


@triton.jit
def register_tile(
    input,
    output,
    mask,
    depth,
    width,
    run,
    blocks,
    block_stride,
    outer,
    place,
    chunk,
    state,
    numbers,
    OBSERVE: tl.constexpr,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    """One chunk of row ``outer`` of a strided reduction; the row's parameters start at ``place``.

    Without ``OBSERVE`` the parameters are taken from ``state``.
    """
    if SHAPE.wide:
        width = width.to(tl.int64)
    width = width * SHAPE.width_unit
    if SHAPE.run_unit == 0:
        run = SHAPE.run
    else:
        run = run * SHAPE.run_unit
    blocks = blocks * SHAPE.blocks_unit
    first_block = chunk * SHAPE.blocks
    d = tl.arange(0, SHAPE.depth)[:, None, None]
    b = tl.arange(0, SHAPE.blocks)[None, :, None]
    r = tl.arange(0, SHAPE.run)[None, None, :]
    block = first_block + tl.arange(0, SHAPE.blocks)
    if SHAPE.blocks_unit % SHAPE.blocks == 0:
        exists = None
    else:
        exists = block < blocks
    EVEN: tl.constexpr = SHAPE.full and SHAPE.blocks_unit % SHAPE.blocks == 0
    if EVEN:
        valid = None
    else:
        valid = first_block + b < blocks
        if not SHAPE.full:
            valid = valid & (d < depth) & (r < run)
    start = outer.to(tl.int64) * depth * width + first_block.to(tl.int64) * run
    tile = d * width + b * run + r
    x = tiles.load_valid(input + start + tile, valid)
    index = place.to(tl.int64) + block.to(tl.int64) * block_stride
    OFFSET: tl.constexpr = CONFIG.format == 0 and CONFIG.use_minval
    # Of each block.
    ZERO_POINT: tl.constexpr = (
        CONFIG.format == 0
        and not CONFIG.use_minval
        and ((CONFIG.asymmetric and CONFIG.scale_format != _E8M0) if OBSERVE else state[3] is not None)
    )
    zp = 0.0
    off = 0.0
    finite = None
    if OBSERVE:
        # The zeros of the padding change nothing: every range is widened to hold zero.
        low, high = block_range(fp32(x), fp32(x), 2)
        low, high = _over_depth(low, high, SHAPE)
        if CONFIG.scale_format != _E8M0:  # whose products need no correction
            finite = is_finite(low, high)
        scale, zero_point, minval = finish(low, high, index, exists, exists, state, numbers, CONFIG, DTYPE)
        if OFFSET:
            zp = numbers[0]
            off = minval
        elif ZERO_POINT:
            zp = zero_point.to(tl.float32)
        elif CONFIG.format == 0 and CONFIG.scale_format != _E8M0:  # the same for all blocks
            zp = numbers[3] * 1.0
    else:
        scale = tiles.load_valid(state[2] + index, exists, 1.0)
        if OFFSET:
            zp = numbers[0]
            off = tiles.load_valid(state[4] + index, exists)
        elif ZERO_POINT:
            zp = tiles.load_valid(state[3] + index, exists, 0).to(tl.float32)
    if SHAPE.blocks == 1:  # one value each
        scale = tl.sum(scale, 0)
        if finite is not None:
            finite = tl.sum(finite.to(tl.int32), 0) != 0
        if OFFSET:
            off = tl.sum(off, 0)
        if ZERO_POINT:
            zp = tl.sum(zp, 0)
    bits = mask
    byte = None
    valid_byte = None
    if mask is not None:
        group = tl.arange(0, SHAPE.blocks * SHAPE.run // 8)[None, :]
        row = tl.arange(0, SHAPE.depth)[:, None]
        byte = group
        if SHAPE.run_unit == 0:
            valid_byte = group * 8 < (blocks - first_block) * run
        else:
            within = group % (SHAPE.run // 8)
            byte = group // (SHAPE.run // 8) * (run // 8) + within
            valid_byte = (first_block + group // (SHAPE.run // 8) < blocks) & (within * 8 < run)
        valid_byte = None if EVEN else valid_byte & (row < depth)
        byte = row * (width // 8) + byte
        bits = mask + start // 8
    tiles.fake_quantize_tile(
        x,
        scale,
        zp,
        off,
        numbers[0],
        numbers[1],
        finite,
        output + start,
        tile,
        valid,
        bits,
        byte,
        valid_byte,
        CONFIG.format,
        ZERO_POINT,
        OFFSET,
        CONFIG.short_bounds and (SHAPE.depth > 1 or SHAPE.blocks * SHAPE.run <= _MOST_BY_PRODUCTS),
        CONFIG.scale_format == _E8M0,
        0 if SHAPE.blocks == 1 else 3,
        True,
    )


@triton.jit(
    do_not_specialize=["depth", "width", "run", "blocks", "chunks", "sizes", "strides"],
    do_not_specialize_on_alignment=["mask"],
)
def _register_tile(
    input,
    output,
    mask,
    depth,
    width,
    run,
    blocks,
    block_stride,
    chunks,
    sizes,
    strides,
    state,
    numbers,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    program = tl.program_id(0)
    outer = program // chunks
    register_tile(
        input,
        output,
        mask,
        depth,
        width,
        run,
        blocks,
        block_stride,
        outer,
        grid_index(outer, sizes, strides, SHAPE.levels),
        program % chunks,
        state,
        numbers,
        True,
        CONFIG,
        DTYPE,
        SHAPE,
    )


@functools.lru_cache(maxsize=8192)
def register_tile_plan(
    geometry: Geometry, element_size: int, with_mask: bool
) -> tuple[int, tuple[Any, ...], dict[str, Any], int] | None:
    """Programs, arguments, constants and warps for :func:`register_tile`; None if it cannot do it.

    A program takes enough neighbouring blocks for 8 KiB and for pieces of 64 bytes; a thread has eight loads
    of 16 bytes, of wider elements sixteen, more when 512 threads are not enough. Masks need bytes of no
    other program.
    """
    strided = geometry.strided
    if strided is None:
        return None
    depth, run = power_of_two(strided.depth), power_of_two(strided.run)
    size = depth * run
    # Elements are held in float32, or as they are if wider.
    size_in_registers = max(element_size, 4)
    largest = (_LARGEST_RUN if depth == 1 else _LARGEST_BLOCK) // size_in_registers
    if size > largest:
        return None
    exact = run == strided.run and run < 8
    if with_mask and (strided.width % 8 if exact else strided.run % 8):
        return None
    wanted = max(8192 // (size * element_size), 64 // (run * element_size), 8 // run, 1)
    blocks = min(power_of_two(wanted), power_of_two(strided.blocks))
    while blocks > 1 and size * blocks > largest:
        blocks //= 2
    if blocks * run * element_size < 32 and depth > 1 and blocks < strided.blocks:
        return None  # columns too tall to be read in pieces worth a transaction
    chunks = triton.cdiv(strided.blocks, blocks)
    width_unit, blocks_unit = tiles.unit_of(strided.width), tiles.unit_of(strided.blocks, blocks)
    run_unit = 0 if run == strided.run else tiles.unit_of(strided.run)
    sizes = tuple(level for level, _ in reversed(strided.outer))
    strides = tuple(stride for _, stride in reversed(strided.outer))
    arguments = (
        strided.depth,
        strided.width // width_unit,
        strided.run // (run_unit or 1),
        strided.blocks // blocks_unit,
        strided.block_stride,
        chunks,
        sizes,
        strides,
    )
    # The more elements a thread has, the more share what it does once: merging ranges, taking parameters. 64
    # of them, of float64 32, with their blocks' parameters, fit its registers.
    bytes_per_thread = min(64 * element_size, 256)
    warps = max(1, min(16, size * blocks * element_size // (32 * bytes_per_thread)))
    vector = min(16 // element_size, blocks * run)
    pieces = max(1, min(depth, size * blocks // (32 * warps * vector)))
    shape = TileShape(
        levels=len(sizes),
        width_unit=width_unit,
        run_unit=run_unit,
        blocks_unit=blocks_unit,
        wide=geometry.wide,
        full=depth == strided.depth and run == strided.run,
        depth=depth,
        blocks=blocks,
        run=run,
        pieces=pieces,
    )
    return strided.outer_size * chunks, arguments, {"SHAPE": shape}, warps


def _step(
    input: Tensor,
    old: tuple[Tensor | None, Tensor | None],
    new: State,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Output and mask; ``new`` (scale, zero point, minimum, new range; contiguous) is written."""
    source = dense(input)
    output = torch.empty_like(input) if source is input else source
    mask = empty_mask(source.numel(), with_mask, source)
    geometry = geometry_of(source, config.block_size)
    if config.update == RangeUpdate.LATEST:
        old = (None, None)
    numbers, constants = numbers_of(config), constants_of(config)
    dtype = tl_dtype(source.dtype)
    # Where the scale of a block depends on all blocks, none can be finished by itself.
    in_parts = config.scale_format == ScaleFormat.E4M3
    plan = None if in_parts else register_tile_plan(geometry, source.element_size(), with_mask)
    if plan is not None:
        programs, arguments, shape, warps = plan
        launch(
            _register_tile,
            programs,
            source,
            source,
            output,
            mask if with_mask else None,
            *arguments,
            (*old, *new),
            numbers,
            CONFIG=constants,
            DTYPE=dtype,
            warps=warps,
            **shape,
        )
        return output, mask
    new = _with_parameters(new, geometry, source, config)
    state = (*old, *new)
    if in_parts:
        new = _choose_from_all(source, old, new, config)
    elif geometry.blocks > 1:
        observe(geometry, source, state, numbers, constants)
    else:
        keep = None if old[0] is None else torch.empty(2, dtype=old[0].dtype, device=source.device)
        partials = reduce_blocks(geometry, source, state, numbers, constants, keep)
        if partials is not None:
            kept = (None, None) if keep is None else (keep[:1], keep[1:])
            quantize_one_block(
                source,
                output,
                mask if with_mask else None,
                partials,
                (*kept, *new),
                numbers,
                constants,
            )
            return output, mask
    tiles.run(
        tiles.FAKE_QUANTIZE,
        geometry,
        source,
        output,
        mask if with_mask else None,
        new[0],  # type: ignore[arg-type]
        *config.parameters(new[1], new[2]),  # type: ignore[arg-type]
        config.format,
        config.quant_min,
        config.quant_max,
    )
    return output, mask


def _choose_from_all(
    source: Tensor, old: tuple[Tensor | None, Tensor | None], new: State, config: QuantConfig
) -> State:
    """Observe all blocks, then choose; ``new`` is written."""
    low, high = next_range(*observe_range(source, list(config.block_size)), *old, config)
    chosen = choose_qparams(
        low, high, config.scheme, config.format, config.quant_min, config.quant_max, config.scale_format
    )
    for kept, value in zip(new, (*chosen, low, high), strict=True):
        if kept is not None:
            kept.copy_(value)
    return new


def _with_parameters(new: State, geometry: Geometry, like: Tensor, config: QuantConfig) -> State:
    """The state with room for the parameters that a later launch has to read."""
    scale, zero_point, minval, low, high = new
    is_int = config.format == Format.INT
    if is_int and not config.use_minval and zero_point is None:
        zero_point = torch.empty(geometry.grid, dtype=torch.int32, device=like.device)
    if is_int and config.use_minval and minval is None:
        minval = torch.empty(geometry.grid, dtype=torch.float32, device=like.device)
    return scale, zero_point, minval, low, high


def observe_and_fake_quantize(
    input: Tensor,
    running_min: Tensor | None,
    running_max: Tensor | None,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``reference/observe_and_fake_quantize.py``."""
    grid = [size // block for size, block in zip(input.shape, config.block_size, strict=True)]
    scale = torch.empty(grid, dtype=torch.float32, device=input.device)
    zero_point, minval = torch.empty_like(scale, dtype=torch.int32), torch.empty_like(scale)
    low = torch.empty(grid, dtype=input.dtype, device=input.device)
    high = torch.empty_like(low)
    old = (_contiguous(running_min), _contiguous(running_max))
    output, mask = _step(input, old, (scale, zero_point, minval, low, high), config, with_mask)
    return output, mask, scale, zero_point, minval, low, high


def observe_and_fake_quantize_(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    running_min: Tensor | None,
    running_max: Tensor | None,
    has_running: bool,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[Tensor, Tensor]:
    """The same with the state written in place."""
    given = (scale, zero_point, minval, running_min, running_max)
    new = tuple(_contiguous(value) for value in given)
    old = new[3:] if has_running else (None, None)
    result = _step(input, old, new, config, with_mask)  # type: ignore[arg-type]
    for value, written in zip(given, new, strict=True):
        if value is not None and written is not value:
            value.copy_(written)  # type: ignore[arg-type]
    return result


def _contiguous(value: Tensor | None) -> Tensor | None:
    return value if value is None else value.contiguous()
