"""``quantize`` and ``dequantize``: to and from the dtype that a compressed model stores."""

import torch
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import fake_quantize as reference
from coreai_kernels.triton import registry as triton

__all__ = ["STORAGE_DTYPES", "dequantize", "quantize"]

STORAGE_DTYPES = (
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float32,
    torch.bfloat16,
    torch.float16,
)

define(
    "quantize",
    "(Tensor input, Tensor scale, Tensor? zero_point, Tensor? minval, SymInt[] block_size, int format, "
    "float quant_min, float quant_max, ScalarType dtype) -> Tensor",
    reference=reference.quantize,
    fake=lambda input, *args: torch.empty_like(input, dtype=args[-1]),
    triton=triton.get("quantize"),
)
define(
    "dequantize",
    "(Tensor input, Tensor scale, Tensor? zero_point, Tensor? minval, SymInt[] block_size, int format, "
    "float quant_min, ScalarType dtype) -> Tensor",
    reference=reference.dequantize,
    fake=lambda input, *args: torch.empty_like(input, dtype=args[-1]),
    triton=triton.get("dequantize"),
)


def _as_kept(
    scale: Tensor, zero_point: Tensor | None, minval: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Parameters in the dtypes and the layout that the kernels take; a module cast to bfloat16 has others."""
    zero_point = None if zero_point is None else zero_point.to(torch.int32).contiguous()
    minval = None if minval is None else minval.detach().float().contiguous()
    return scale.detach().float().contiguous(), zero_point, minval


def quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minval: Tensor | None = None,
    *,
    block_size: tuple[int, ...],
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
    dtype: torch.dtype,
) -> Tensor:
    """Quantized values of ``input``: ``clamp(q)`` in :func:`coreai_kernels.fake_quantize`'s formulas.

    Args:
        input: float32, bfloat16, float16 or float64 tensor of any shape and strides.
        scale: one value per block.
        zero_point: int32, shape of ``scale``. Zero-point formulation.
        minval: float32, shape of ``scale``. Min-value formulation.
        block_size: extent of a block along each axis; must divide the shape.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        format: a :class:`coreai_kernels.Format`.
        dtype: dtype of the result, one of :data:`STORAGE_DTYPES` that holds the whole range. NaN has no
            integer: it becomes 0 in int8 and uint8.

    Returns:
        Tensor of the input's shape and memory format. Narrower values than a byte: :func:`pack_bits`.

    Raises:
        ValueError: block size, parameter shapes, range or ``dtype`` do not fit.
        TypeError: ``input`` is not floating point.
    """
    fmt = Format(format)
    checks.check_float_input("input", input)
    checks.check_range(fmt, quant_min, quant_max)
    grid = checks.check_blocks("block_size", input, block_size)
    checks.check_params(grid, input, scale, zero_point, minval)
    if dtype not in STORAGE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, STORAGE_DTYPES))}; got {dtype}")
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        if fmt != Format.INT or quant_min < limits.min or quant_max > limits.max:
            raise ValueError(
                f"dtype {dtype} cannot hold {fmt.name} values of [{quant_min}, {quant_max}]: choose another"
            )
    return implementation("quantize")(  # type: ignore[no-any-return]
        input.detach(), *_as_kept(scale, zero_point, minval), block_size, fmt, quant_min, quant_max, dtype
    )


def dequantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minval: Tensor | None = None,
    *,
    block_size: tuple[int, ...],
    quant_min: float,
    format: int = Format.INT,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Values that quantized ones stand for: ``(q - z) * scale + o``, or ``q * scale`` for float formats.

    Args:
        input: quantized values in one of :data:`STORAGE_DTYPES`.
        scale: one value per block.
        zero_point: int32, shape of ``scale``. Zero-point formulation.
        minval: float32, shape of ``scale``. Min-value formulation.
        block_size: extent of a block along each axis; must divide the shape.
        quant_min: smallest quantized value: the zero point of the min-value formulation.
        format: a :class:`coreai_kernels.Format`.
        dtype: dtype of the result: float32, bfloat16, float16 or float64.

    Returns:
        Tensor of the input's shape and memory format.

    Raises:
        ValueError: block size or parameter shapes do not fit.
        TypeError: ``input`` or ``dtype`` is not supported.
    """
    if input.dtype not in STORAGE_DTYPES:
        raise TypeError(f"input must be one of {', '.join(map(str, STORAGE_DTYPES))}; got {input.dtype}")
    if dtype not in checks.INPUT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, checks.INPUT_DTYPES))}; got {dtype}")
    grid = checks.check_blocks("block_size", input, block_size)
    checks.check_params(grid, input, scale, zero_point, minval)
    return implementation("dequantize")(  # type: ignore[no-any-return]
        input, *_as_kept(scale, zero_point, minval), block_size, Format(format), quant_min, dtype
    )
