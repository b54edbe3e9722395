"""The hot operations on tensors without data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coreai_kernels import Format, QuantConfig, RangeUpdate, ScaleFormat, Scheme
from coreai_kernels.triton import (
    fake_quantize,
    learnable_range,
    masks,
    observe_and_fake_quantize,
    observe_range,
    palettes,
    qparams,
    sampled_mask,
)

__all__ = ["Variant", "variants"]

SHAPE = (1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS = {"tensor": SHAPE, "rows": (1, SHAPE[1]), "columns": (SHAPE[0], 1), "blocks of 32": (1, 32)}
# Format, quant_min, quant_max, scale format, granularities.
FORMATS = {
    "int4": (Format.INT, -8.0, 7.0, ScaleFormat.FLOAT32, ("tensor", "rows", "columns", "blocks of 32")),
    "int8": (Format.INT, -128.0, 127.0, ScaleFormat.FLOAT32, ("tensor", "rows")),
    "fp8": (Format.E4M3, -448.0, 448.0, ScaleFormat.FLOAT32, ("tensor", "rows")),
    "MXFP4": (Format.E2M1, -6.0, 6.0, ScaleFormat.E8M0, ("blocks of 32",)),
    "MXINT8": (Format.INT, -128.0, 127.0, ScaleFormat.E8M0, ("blocks of 32",)),
}


@dataclass(frozen=True)
class Variant:
    """An operation on certain tensors.

    Attributes:
        operation, case, dtype: names for the table.
        run: calls the operator.
        elements: of the large tensor.
        read, written: bytes of large tensors an element.
    """

    operation: str
    case: str
    dtype: str
    run: Callable[[], Any]
    elements: int
    read: float
    written: float


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _grid(block: tuple[int, ...]) -> list[int]:
    return [size // part for size, part in zip(SHAPE, block, strict=True)]


def variants() -> Iterator[Variant]:
    """All of them."""
    for name, dtype in DTYPES.items():
        size, x = dtype.itemsize, _meta(*SHAPE, dtype=dtype)
        elements = x.numel()

        def make(
            operation: str,
            case: str,
            run: Callable[[], Any],
            read: float,
            written: float,
            name: str = name,
            elements: int = elements,
        ) -> Variant:
            return Variant(operation, case, name, run, elements, read, written)

        for format_name, (fmt, low, high, scale_format, granularities) in FORMATS.items():
            for blocks in granularities:
                case = f"{format_name}, {blocks}"
                yield make("forward", case, _forward(x, blocks, fmt, low, high), size, size + 1 / 8)
                step = _step(x, blocks, fmt, low, high, scale_format)
                yield make("observe and quantize", case, step, size, size + 1 / 8)
        bits = _meta(elements // 8, dtype=torch.uint8)
        backward = lambda x=x, bits=bits: fake_quantize.fake_quantize_backward(x, bits, [])  # noqa: E731
        yield make("backward", "", backward, size + 1 / 8, size)
        for blocks in ("tensor", "rows", "columns"):
            block = list(BLOCKS[blocks])
            yield make(
                "observe", blocks, lambda x=x, block=block: observe_range.observe_range(x, block), size, 0
            )
        yield make("N:M mask", "2:4", lambda x=x: masks.nm_mask(x, 2, 4, -1), size, size)
        logits, draw = _meta(*SHAPE), _meta(dtype=torch.int64)
        yield make(
            "sampled mask",
            "",
            lambda x=x, logits=logits, draw=draw: sampled_mask.sampled_mask_forward(x, logits, draw, 0),
            size + 4,
            size,
        )
        table, indices = _meta(1, 16, 1, dtype=dtype), _meta(*SHAPE, dtype=torch.uint8)
        yield make(
            "look-up",
            "16 entries",
            lambda table=table, indices=indices: palettes.lookup(indices, table, list(SHAPE)),
            1,
            size,
        )
        span = _meta(1024, 1)
        yield make(
            "learned range, backward",
            "int8, rows",
            lambda x=x, span=span: learnable_range.learnable_range_backward(
                x, x, None, span, list(BLOCKS["rows"]), -128.0, 127.0
            ),
            2 * size,
            size,
        )
    low_end = _meta(4096)
    yield Variant(
        "choose parameters",
        "int8, 4096 blocks",
        "fp32",
        lambda: qparams.choose_qparams(
            low_end, low_end, Scheme.SYMMETRIC, Format.INT, -128.0, 127.0, ScaleFormat.FLOAT32
        ),
        4096,
        8,
        4,
    )


def _forward(x: Tensor, blocks: str, fmt: Format, low: float, high: float) -> Callable[[], Any]:
    block = BLOCKS[blocks]
    grid = _grid(block)
    zero_point = _meta(*grid, dtype=torch.int32) if fmt == Format.INT else None
    return lambda: fake_quantize.fake_quantize_forward(
        x, _meta(*grid), zero_point, None, list(block), fmt, low, high, True
    )


def _step(
    x: Tensor, blocks: str, fmt: Format, low: float, high: float, scale_format: ScaleFormat
) -> Callable[[], Any]:
    block = BLOCKS[blocks]
    grid = _grid(block)
    is_int = fmt == Format.INT
    config = QuantConfig(
        block, Scheme.SYMMETRIC, fmt, low, high, update=RangeUpdate.MOVING_AVERAGE, scale_format=scale_format
    )
    running = _meta(*grid, dtype=x.dtype)
    return lambda: observe_and_fake_quantize.observe_and_fake_quantize_(
        x,
        _meta(*grid),
        _meta(*grid, dtype=torch.int32) if is_int else None,
        _meta(*grid) if is_int else None,
        running,
        running,
        True,
        config,
        True,
    )
