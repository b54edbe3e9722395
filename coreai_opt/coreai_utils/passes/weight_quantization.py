"""Quantizes the weights of a program."""

from typing import Any

from coreai.authoring import AIProgram

from coreai_opt.coreai_utils._program import Builder, Unsuitable, Weight, check_threshold, compress
from coreai_opt.coreai_utils._quantization import quantize
from coreai_opt.coreai_utils.common import CompressionGranularity, DType, QScheme, member

__all__ = ["quantize_weights"]

_GRANULARITIES = (
    CompressionGranularity.PER_TENSOR,
    CompressionGranularity.PER_CHANNEL,
    CompressionGranularity.PER_BLOCK,
)
_FP4_BLOCK = 32


def quantize_weights(
    coreai_program: AIProgram,
    dtype: DType,
    qscheme: QScheme = QScheme.SYMMETRIC,
    granularity: CompressionGranularity = CompressionGranularity.PER_CHANNEL,
    block_size: int = 32,
    weight_num_threshold: int = 1024,
    scale_dtype: DType | None = None,
    in_place: bool = False,
) -> AIProgram:
    """Quantize the weights of matrix products, convolutions and embeddings.

    A weight that the blocks do not divide stays as it is, with a warning in the log.

    Args:
        coreai_program: the program.
        dtype: type of the quantized values; ``FP4_E2M1FN`` has blocks of 32 and power-of-two scales.
        qscheme: for integers; floats are symmetric.
        granularity: per tensor, per output channel, or per block of ``block_size`` inputs of a channel.
        block_size: inputs that share a scale.
        weight_num_threshold: weights with so many elements or fewer stay.
        scale_dtype: ``FP8_E8M0FNU`` for power-of-two scales of 8-bit floats; None for the weight's dtype.
        in_place: change ``coreai_program`` itself, else a copy.

    Returns:
        The program with quantized weights.

    Raises:
        TypeError: ``coreai_program`` is none.
        ValueError: an argument is not allowed, or two exclude each other.
    """
    dtype = member(DType, "dtype", dtype)
    qscheme = member(QScheme, "qscheme", qscheme)
    granularity = member(CompressionGranularity, "granularity", granularity, _GRANULARITIES)
    check_threshold(weight_num_threshold)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive number of elements; got {block_size!r}")
    has_power_of_two_scale = _check_scale(dtype, scale_dtype)
    if dtype == DType.FP8_E8M0FNU:
        raise ValueError("dtype fp8_e8m0fnu is for scales: it has no sign and no zero")
    if not dtype.is_int() and qscheme == QScheme.ASYMMETRIC:
        raise ValueError(f"qscheme must be symmetric for the floating-point dtype {dtype}; got {qscheme}")
    in_blocks = granularity == CompressionGranularity.PER_BLOCK
    if dtype == DType.FP4_E2M1FN and not (in_blocks and block_size == _FP4_BLOCK):
        raise ValueError(
            f"dtype {dtype} needs granularity per_block with block_size {_FP4_BLOCK}; "
            f"got {granularity} with {block_size}"
        )

    def replacement(weight: Weight, builder: Builder) -> Any:
        blocks = _block_size(weight, granularity, block_size)
        return quantize(weight.values, dtype, qscheme, blocks, has_power_of_two_scale).build(builder)

    return compress(coreai_program, weight_num_threshold, in_place, replacement)


def _check_scale(dtype: DType, scale_dtype: Any) -> bool:
    """Whether scales are powers of two."""
    if scale_dtype is None:
        return dtype == DType.FP4_E2M1FN
    member(DType, "scale_dtype", scale_dtype)
    if dtype not in (DType.FP8_E4M3FN, DType.FP8_E5M2):
        raise ValueError(f"scale_dtype must be None for dtype {dtype}; got {scale_dtype}")
    if scale_dtype != DType.FP8_E8M0FNU:
        raise ValueError(f"scale_dtype must be None or fp8_e8m0fnu; got {scale_dtype}")
    return True


def _block_size(weight: Weight, granularity: CompressionGranularity, block_size: int) -> tuple[int, ...]:
    shape = weight.values.shape
    blocks = list(shape)
    if granularity != CompressionGranularity.PER_TENSOR:
        blocks[weight.output_axis] = 1
    if granularity == CompressionGranularity.PER_BLOCK:
        if weight.input_axis == weight.output_axis or shape[weight.input_axis] % block_size:
            raise Unsuitable(f"blocks of {block_size} do not divide axis {weight.input_axis}")
        blocks[weight.input_axis] = block_size
    return tuple(blocks)
