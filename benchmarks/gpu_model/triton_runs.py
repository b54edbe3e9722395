"""The hot operations on tensors without data, as Triton's kernels do them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_model.cases import SHAPE, NumberFormat, block_of
from coreai_kernels import Format, QuantConfig, RangeUpdate
from coreai_kernels.triton import (
    fake_quantize,
    layout,
    learnable_range,
    masks,
    observe_and_fake_quantize,
    observe_range,
    palettes,
    qparams,
    sampled_mask,
)

__all__ = [
    "Run",
    "backward",
    "choose",
    "forward",
    "learned",
    "looked_up",
    "n_of_m",
    "observe",
    "observe_then_quantize",
    "sampled",
    "step",
]

Run = Callable[[], Any]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _large(dtype: torch.dtype) -> Tensor:
    return _meta(*SHAPE, dtype=dtype)


def _grid(block: tuple[int, ...]) -> list[int]:
    return [size // part for size, part in zip(SHAPE, block, strict=True)]


def forward(fmt: NumberFormat, blocks: str, dtype: torch.dtype) -> Run:
    """``fake_quantize`` with a mask for the gradient."""
    x, block = _large(dtype), block_of(blocks)
    grid = _grid(block)
    zero_point = _meta(*grid, dtype=torch.int32) if fmt.format == Format.INT else None
    return lambda: fake_quantize.fake_quantize_forward(
        x, _meta(*grid), zero_point, None, list(block), fmt.format, fmt.low, fmt.high, True
    )


def backward(dtype: torch.dtype, in_place: bool) -> Run:
    """Its gradient."""
    x, bits = _large(dtype), _meta(SHAPE[0] * SHAPE[1] // 8, dtype=torch.uint8)
    if in_place:
        return lambda: fake_quantize.fake_quantize_backward_(x, bits, [])
    return lambda: fake_quantize.fake_quantize_backward(x, bits, [])


def step(fmt: NumberFormat, blocks: str, dtype: torch.dtype) -> Run:
    """``observe_and_fake_quantize_`` with a running range that is averaged."""
    x, block = _large(dtype), block_of(blocks)
    grid = _grid(block)
    is_int = fmt.format == Format.INT
    config = QuantConfig(
        *(block, fmt.scheme, fmt.format, fmt.low, fmt.high),
        update=RangeUpdate.MOVING_AVERAGE,
        scale_format=fmt.scales,
    )
    running = _meta(*grid, dtype=dtype)
    zero_point = _meta(*grid, dtype=torch.int32) if is_int else None
    minval = _meta(*grid) if is_int else None
    return lambda: observe_and_fake_quantize.observe_and_fake_quantize_(
        x, _meta(*grid), zero_point, minval, running, running, True, config, True
    )


def observe(blocks: str, dtype: torch.dtype) -> Run:
    """``observe_range``."""
    x, block = _large(dtype), list(block_of(blocks))
    return lambda: observe_range.observe_range(x, block)


def observe_then_quantize(fmt: NumberFormat, blocks: str, dtype: torch.dtype) -> Run:
    """A step in two launches, as blocks take it that no program can hold."""
    x, block = _large(dtype), block_of(blocks)
    grid = _grid(block)
    config = QuantConfig(
        *(block, fmt.scheme, fmt.format, fmt.low, fmt.high),
        update=RangeUpdate.MOVING_AVERAGE,
        scale_format=fmt.scales,
    )
    geometry = layout.geometry_of(x, block)
    running = _meta(*grid, dtype=dtype)
    state = (running, running, _meta(*grid), _meta(*grid, dtype=torch.int32), None, running, running)
    quantize = forward(fmt, blocks, dtype)

    def run() -> None:
        observe_range.observe(geometry, x, state, qparams.numbers_of(config), qparams.constants_of(config))
        quantize()

    return run


def choose(fmt: NumberFormat, blocks: int) -> Run:
    """``choose_qparams`` of so many blocks."""
    ends = _meta(blocks)
    return lambda: qparams.choose_qparams(ends, ends, fmt.scheme, fmt.format, fmt.low, fmt.high, fmt.scales)


def n_of_m(n: int, m: int, dtype: torch.dtype) -> Run:
    """``nm_mask`` along rows."""
    x = _large(dtype)
    return lambda: masks.nm_mask(x, n, m, -1)


def sampled(dtype: torch.dtype, with_gradient: bool) -> Run:
    """``sampled_mask``, or its gradient."""
    x, logits, draw = _large(dtype), _meta(*SHAPE), _meta(dtype=torch.int64)
    if with_gradient:
        return lambda: sampled_mask.sampled_mask_backward(x, x, logits, draw, 0)
    return lambda: sampled_mask.sampled_mask_forward(x, logits, draw, 0)


def looked_up(bits: int, dtype: torch.dtype) -> Run:
    """``lookup`` in one palette, of indices of a byte or packed ones."""
    table, shape = _meta(1, 1 << bits, 1, dtype=dtype), list(SHAPE)
    if bits == 8:
        indices = _meta(*SHAPE, dtype=torch.uint8)
        return lambda: palettes.lookup(indices, table, shape)
    packed = _meta(SHAPE[0] * SHAPE[1] * bits // 8, dtype=torch.uint8)
    return lambda: palettes.lookup_packed(packed, table, shape, shape, bits)


def learned(blocks: str, dtype: torch.dtype) -> Run:
    """``learnable_range_backward`` of a symmetric range."""
    x, block = _large(dtype), block_of(blocks)
    span = _meta(*_grid(block))
    return lambda: learnable_range.learnable_range_backward(x, x, None, span, list(block), -128.0, 127.0)
