"""Lists of tensors: one launch for all whose tiles are of one form, instead of one each.

What differs between the tensors (addresses, sizes) is in a table in the GPU's memory, a row each; a launch
has as many programs for each row as the largest tensor needs, and those that find nothing to do end at once.
The table goes to the GPU from pinned memory, so nothing waits. While a CUDA graph is captured each tensor has
launches of its own: a replay has no host time to save, and would read the table of the capture.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.formats import ScaleFormat
from coreai_kernels.quant_config import QuantConfig
from coreai_kernels.reference.foreach import mask_starts, split_block_sizes
from coreai_kernels.triton import fake_quantize, observe_and_fake_quantize, tiles
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import dense, geometry_of
from coreai_kernels.triton.observe_and_fake_quantize import register_tile, register_tile_plan
from coreai_kernels.triton.qparams import constants_of, numbers_of, tl_dtype
from coreai_kernels.types import RangeUpdate, Scheme

__all__ = [
    "foreach_fake_quantize_backward",
    "foreach_fake_quantize_backward_",
    "foreach_fake_quantize_forward",
    "foreach_observe_and_fake_quantize_",
]

# Addresses at multiples of this many bytes allow the widest loads.
_ALIGNMENT = 16
# Columns of the table: input and output, as distances in elements from the launch's base pointer, because the
# compiler knows the alignment of sums and not of addresses; the addresses of mask, old range, scale, zero
# point, minimum and new range; depth, width, run, blocks, block stride and chunks of the strided reduction;
# the number of programs; sizes and strides of the outer levels.
_SIZES = tl.constexpr(10)
_PROGRAMS = tl.constexpr(16)
_LEVELS = tl.constexpr(17)

Row = tuple[Tensor | None, ...]


@triton.jit
def _address(record, COLUMN: tl.constexpr, DTYPE: tl.constexpr, GIVEN: tl.constexpr):
    """The pointer in a column of the table, or None."""
    if GIVEN:
        pointer = tl.load(record + COLUMN).to(tl.pointer_type(DTYPE))
    else:
        pointer = None
    return pointer


@triton.jit
def _aligned(base, record, COLUMN: tl.constexpr):
    """The pointer to whose distance from ``base`` is in a column of the table: at a multiple of 16 bytes."""
    UNIT: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    return base + tl.multiple_of(tl.load(record + COLUMN), UNIT)


@triton.jit
def _register_tile_list(
    base,
    table,
    most,
    numbers,
    OBSERVE: tl.constexpr,
    GIVEN: tl.constexpr,
    CONFIG: tl.constexpr,
    DTYPE: tl.constexpr,
    SHAPE: tl.constexpr,
):
    LEVELS: tl.constexpr = SHAPE.levels
    record = table + (tl.program_id(0) // most).to(tl.int64) * (_LEVELS + 2 * LEVELS)
    program = tl.program_id(0) % most
    if program >= tl.load(record + _PROGRAMS):
        return
    chunks = tl.load(record + _SIZES + 5).to(tl.int32)
    outer = program // chunks
    place = outer * 0
    position = outer
    for level in tl.static_range(LEVELS):
        size = tl.load(record + _LEVELS + level).to(tl.int32)
        stride = tl.load(record + _LEVELS + LEVELS + level).to(tl.int32)
        if level == LEVELS - 1:
            place += position * stride
        else:
            place += position % size * stride
            position = position // size
    state = (
        _address(record, 3, DTYPE, GIVEN[0]),
        _address(record, 4, DTYPE, GIVEN[0]),
        _address(record, 5, tl.float32, True),
        _address(record, 6, tl.int32, GIVEN[1]),
        _address(record, 7, tl.float32, GIVEN[2]),
        _address(record, 8, DTYPE, GIVEN[3]),
        _address(record, 9, DTYPE, GIVEN[4]),
    )
    register_tile(
        _aligned(base, record, 0),
        _aligned(base, record, 1),
        _address(record, 2, tl.uint8, GIVEN[5]),
        tl.load(record + _SIZES).to(tl.int32),
        tl.load(record + _SIZES + 1).to(tl.int32),
        tl.load(record + _SIZES + 2).to(tl.int32),
        tl.load(record + _SIZES + 3).to(tl.int32),
        tl.load(record + _SIZES + 4).to(tl.int32),
        outer,
        place,
        program % chunks,
        state,
        numbers,
        OBSERVE,
        CONFIG,
        DTYPE,
        SHAPE,
    )


@triton.jit
def _backward_list(
    base,
    table,
    most,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    record = table + (tl.program_id(0) // most).to(tl.int64) * 4
    start = (tl.program_id(0) % most).to(tl.int64) * TILE
    left = tl.load(record + 3) * UNIT - start
    if left <= 0:
        return
    grad = _aligned(base, record, 0)
    output = _aligned(base, record, 1)
    mask = _address(record, 2, tl.uint8, True)
    group = tl.arange(0, TILE // 8)
    lane = tl.arange(0, 8)
    element = group[:, None] * 8 + lane[None, :]
    bits = tl.load(mask + start // 8 + group, mask=group * 8 < left, other=0).to(tl.int32)
    valid = element < left
    if IN_PLACE:  # what passes is not even read
        valid = valid & (bits != 255)[:, None]
    g = tl.load(grad + start + element, mask=valid, other=0.0)
    tl.store(output + start + element, fake_quantize.masked(g, bits), mask=valid)


class _Launches:
    """Rows of tables, collected by what one launch has in common."""

    def __init__(self) -> None:
        self._groups: dict[tuple[Any, ...], tuple[dict[str, Any], Tensor, list[list[int]], list[int]]] = {}

    def add(self, constants: dict[str, Any], x: Tensor, y: Tensor, row: list[int], programs: int) -> None:
        """A row of the table for the kernel with ``constants``, which needs ``programs`` programs.

        ``x`` and ``y`` are what it reads and writes, ``row`` the columns behind them.
        """
        _, base, rows, counts = self._groups.setdefault(tuple(constants.values()), (constants, x, [], []))
        start, size = base.data_ptr(), base.element_size()
        rows.append([(x.data_ptr() - start) // size, (y.data_ptr() - start) // size, *row])
        counts.append(programs)

    def run(self, kernel: Any, *args: Any) -> None:
        """Launch ``kernel(base, table, most programs of a tensor, *args)`` for each group."""
        for constants, base, rows, counts in self._groups.values():
            table = torch.tensor(rows, dtype=torch.int64, pin_memory=base.is_cuda)
            table = table.to(base.device, non_blocking=True)
            launch(kernel, max(counts) * len(rows), base, base, table, max(counts), *args, **constants)


def _each_alone(on: Tensor) -> bool:
    return on.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)


def _address_of(value: Tensor | None) -> int:
    return 0 if value is None else value.data_ptr()


class _Forward:
    """Outputs and masks of a list, from launches for several tensors and from operators on single ones."""

    def __init__(self, inputs: Sequence[Tensor], with_mask: bool, **common: Any) -> None:
        self.starts = mask_starts(inputs)
        on = inputs[0] if inputs else torch.empty(0)
        self.mask = fake_quantize.empty_mask(8 * self.starts[-1], with_mask, on)
        self.outputs: list[Tensor] = []
        self._with_mask = with_mask
        self._common = common
        self._alone = _each_alone(on)
        self._launches = _Launches()

    def take(self, x: Tensor, row: Row, old: Row, block_size: Sequence[int]) -> bool:
        """Make the tensor part of a launch, if its form and memory allow that."""
        if self._alone or x.numel() == 0 or dense(x) is not x:
            return False
        if not all(value is None or value.is_contiguous() for value in row):
            return False
        output = torch.empty_like(x)
        plan = register_tile_plan(geometry_of(x, tuple(block_size)), x.element_size(), self._with_mask)
        if plan is None or not _is_aligned(x, output):
            return False
        programs, arguments, constants, warps = plan
        *sizes, level_sizes, level_strides = arguments
        mask = self.mask.data_ptr() + self.starts[len(self.outputs)] if self._with_mask else 0
        addresses = [mask, *map(_address_of, (*old, *row))]
        given = (
            old[0] is not None,
            *(len(row) > i and row[i] is not None for i in range(1, 5)),
            self._with_mask,
        )
        form = {"GIVEN": given, "DTYPE": tl_dtype(x.dtype), **self._common, "warps": warps, **constants}
        numbers = [*addresses, *sizes, programs, *level_sizes, *level_strides]
        self._launches.add(form, x, output, numbers, programs)
        self.outputs.append(output)
        return True

    def append(self, output: Tensor, bits: Tensor) -> None:
        """What an operator on a single tensor returned."""
        start = self.starts[len(self.outputs)]
        self.mask[start : start + bits.numel()] = bits
        self.outputs.append(output)

    def run(self, numbers: tuple[Any, ...]) -> tuple[list[Tensor], Tensor]:
        """Start the launches; outputs and masks."""
        self._launches.run(_register_tile_list, numbers)
        return self.outputs, self.mask


def foreach_fake_quantize_forward(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    minvals: Sequence[Tensor],
    block_sizes: Sequence[int],
    format: int,
    quant_min: float,
    quant_max: float,
    with_mask: bool,
) -> tuple[list[Tensor], Tensor]:
    """See ``reference/foreach.py``."""
    config = QuantConfig((), Scheme.SYMMETRIC, format, quant_min, quant_max, use_minval=bool(minvals))
    forward = _Forward(inputs, with_mask, OBSERVE=False, CONFIG=constants_of(config))
    for i, (x, block_size) in enumerate(zip(inputs, split_block_sizes(inputs, block_sizes), strict=True)):
        zero_point = zero_points[i] if zero_points else None
        minval = minvals[i] if minvals else None
        row = (scales[i], zero_point, minval, None, None)
        if not forward.take(x, row, (None, None), block_size):
            forward.append(
                *fake_quantize.fake_quantize_forward(
                    x,
                    scales[i],
                    zero_point,
                    minval,
                    list(block_size),
                    format,
                    quant_min,
                    quant_max,
                    with_mask,
                )
            )
    return forward.run(numbers_of(config))


def foreach_observe_and_fake_quantize_(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    minvals: Sequence[Tensor],
    running_mins: Sequence[Tensor],
    running_maxs: Sequence[Tensor],
    has_running: bool,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[list[Tensor], Tensor]:
    """See ``reference/foreach.py``."""
    columns = (scales, zero_points, minvals, running_mins, running_maxs)
    forward = _Forward(inputs, with_mask, OBSERVE=True, CONFIG=constants_of(config))
    split = split_block_sizes(inputs, config.block_size)
    # Scales of two levels need all blocks of a tensor at once.
    each_alone = config.scale_format == ScaleFormat.E4M3
    for i, (x, block_size) in enumerate(zip(inputs, split, strict=True)):
        row: tuple[Any, ...] = tuple(column[i] if column else None for column in columns)
        old = row[3:] if has_running and config.update != RangeUpdate.LATEST else (None, None)
        if each_alone or not forward.take(x, row, old, block_size):
            its_config = config.with_block_size(block_size)
            step = observe_and_fake_quantize.observe_and_fake_quantize_
            forward.append(*step(x, *row, has_running, its_config, with_mask))  # type: ignore[call-arg]
    return forward.run(numbers_of(config))


def foreach_fake_quantize_backward(
    grads: Sequence[Tensor], mask: Tensor, starts: Sequence[int], orders: Sequence[int]
) -> list[Tensor]:
    """See ``reference/foreach.py``."""
    split = split_block_sizes(grads, orders) if orders else [()] * len(grads)
    results: list[Any] = [
        torch.empty_like(grad) if not order and grad.is_contiguous() else None
        for grad, order in zip(grads, split, strict=True)
    ]
    for i, bits in _launch_backward(grads, results, mask, starts):
        results[i] = fake_quantize.fake_quantize_backward(grads[i], bits, list(split[i]))
    return results


def foreach_fake_quantize_backward_(
    grads: Sequence[Tensor], mask: Tensor, starts: Sequence[int], orders: Sequence[int]
) -> None:
    """The same in place, of gradients that lie in memory as ``orders`` says."""
    split = split_block_sizes(grads, orders) if orders else [()] * len(grads)
    results = [
        grad if not order and grad.is_contiguous() else None for grad, order in zip(grads, split, strict=True)
    ]
    for i, bits in _launch_backward(grads, results, mask, starts):
        fake_quantize.fake_quantize_backward_(grads[i], bits, list(split[i]))


def _launch_backward(
    grads: Sequence[Tensor], results: Sequence[Tensor | None], mask: Tensor, starts: Sequence[int]
) -> list[tuple[int, Tensor]]:
    """Mask gradients that have a row-major result to go to.

    Returns:
        Indices and masks of those that are left.
    """
    launches, left = _Launches(), []
    alone = _each_alone(mask)
    for i, (grad, result, start) in enumerate(zip(grads, results, starts, strict=True)):
        numel = grad.numel()
        if alone or numel == 0 or result is None or not _is_aligned(grad, result):
            left.append((i, mask[start : start + (numel + 7) // 8]))
            continue
        unit, tile = tiles.unit_of(numel), tiles.tile_elements(numel, grad.element_size())
        row = [mask.data_ptr() + start, numel // unit]
        form = {"DTYPE": tl_dtype(grad.dtype), "UNIT": unit, "TILE": tile}
        form |= {"IN_PLACE": fake_quantize.leaves_what_passes(grad, result), "warps": 4}
        launches.add(form, grad, result, row, triton.cdiv(numel, tile))
    launches.run(_backward_list)
    return left
