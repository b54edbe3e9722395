"""Prunes the weights of a program, and compresses what stays."""

from typing import Any

import torch
from coreai._compiler.ir import IntegerType
from coreai.authoring import AIProgram
from torch import Tensor

from coreai_opt.coreai_utils._masks import block_mask, magnitude_mask, nm_mask, selected
from coreai_opt.coreai_utils._program import Builder, Weight, check_threshold, compress, logger
from coreai_opt.coreai_utils._quantization import element_type, scaled_symmetric
from coreai_opt.coreai_utils.common import DType, member
from coreai_opt.coreai_utils.passes.weight_palettization import N_BITS, VALUE_DTYPES, find_palettes

__all__ = ["sparsify_weights"]


def sparsify_weights(
    coreai_program: AIProgram,
    target_sparsity: float | None = 0.5,
    block_size: int | None = None,
    n_m_ratio: tuple[int, int] | None = None,
    quantize_dtype: DType | None = None,
    palettize_nbits: int | None = None,
    weight_num_threshold: int = 1024,
    in_place: bool = False,
) -> AIProgram:
    """Store the weights of matrix products, convolutions and embeddings as a mask and the values that stay.

    A weight that blocks or groups do not fit stays as it is, with a warning in the log.

    Args:
        coreai_program: the program.
        target_sparsity: fraction of the elements, or blocks, that become zero: those of least magnitude, and
            all that tie with the last of them. None with ``n_m_ratio``.
        block_size: output channels that are pruned together, by their L2 norm; None for single elements.
        n_m_ratio: ``(n, m)``: of each ``m`` consecutive inputs the ``n`` smallest become zero.
        quantize_dtype: quantize the values that stay, with one scale.
        palettize_nbits: palettize the values that stay, with one palette of ``2 ** palettize_nbits``.
        weight_num_threshold: weights with so many elements or fewer stay.
        in_place: change ``coreai_program`` itself, else a copy.

    Returns:
        The program with sparse weights.

    Raises:
        TypeError: ``coreai_program`` is none.
        ValueError: an argument is not allowed, or two exclude each other.
    """
    check_threshold(weight_num_threshold)
    _check_pruning(target_sparsity, block_size, n_m_ratio)
    if quantize_dtype is not None:
        quantize_dtype = member(DType, "quantize_dtype", quantize_dtype, VALUE_DTYPES)
    if palettize_nbits is not None and palettize_nbits not in N_BITS:
        raise ValueError(f"palettize_nbits must be None or one of {N_BITS}; got {palettize_nbits!r}")
    if quantize_dtype is not None and palettize_nbits is not None:
        raise ValueError("quantize_dtype and palettize_nbits exclude each other; got both")

    def replacement(weight: Weight, builder: Builder) -> Any:
        if n_m_ratio is not None:
            mask = nm_mask(weight.values, *n_m_ratio, weight.input_axis)
        elif block_size is not None:
            assert target_sparsity is not None
            mask = block_mask(weight.values, target_sparsity, block_size, weight.output_axis)
        else:
            assert target_sparsity is not None
            mask = magnitude_mask(weight.values, target_sparsity)
        if n_m_ratio is not None or block_size is not None or not target_sparsity:
            mask = mask & (weight.values != 0)  # above a quantile there are no zeros
        bitmask = builder.constant(mask.view(torch.uint8), IntegerType.get_unsigned(1))
        return _stored(
            builder, selected(weight.values, mask), bitmask, mask.dim(), quantize_dtype, palettize_nbits
        )

    return compress(coreai_program, weight_num_threshold, in_place, replacement)


def _check_pruning(target_sparsity: Any, block_size: Any, n_m_ratio: Any) -> None:
    if (target_sparsity is None) == (n_m_ratio is None):
        raise ValueError(
            f"one of target_sparsity and n_m_ratio must be given, and the other None; "
            f"got {target_sparsity!r} and {n_m_ratio!r}"
        )
    if target_sparsity is not None and not 0 <= target_sparsity <= 1:
        raise ValueError(f"target_sparsity must be in [0, 1]; got {target_sparsity!r}")
    if block_size is not None and not (isinstance(block_size, int) and block_size > 1):
        raise ValueError(f"block_size must be None or a whole number above 1; got {block_size!r}")
    if n_m_ratio is not None:
        is_pair = isinstance(n_m_ratio, tuple | list) and len(n_m_ratio) == 2
        if not is_pair or not all(isinstance(each, int) for each in n_m_ratio):
            raise ValueError(f"n_m_ratio must be two whole numbers; got {n_m_ratio!r}")
        n, m = n_m_ratio
        if m <= 0 or not 0 <= n <= m:
            raise ValueError(f"n_m_ratio must satisfy 0 <= n <= m and m > 0; got {n_m_ratio!r}")


def _stored(
    builder: Builder,
    kept: Tensor,
    bitmask: Any,
    rank: int,
    quantize_dtype: DType | None,
    palettize_nbits: int | None,
) -> Any:
    """The values that stay, compressed, at their places."""
    if (quantize_dtype is not None or palettize_nbits is not None) and not kept.numel():
        logger.warning("a weight has no values but zeros: they are neither quantized nor palettized")
    elif quantize_dtype is not None:
        return _quantized(builder, kept, bitmask, rank, quantize_dtype)
    elif palettize_nbits is not None:
        palettes, indices = find_palettes(kept, palettize_nbits, 0, kept.numel(), 1, None)
        lut = palettes.reshape(1, -1, 1).to(kept.dtype)
        index_type = IntegerType.get_unsigned(palettize_nbits)
        values = builder.look_up(builder.constant(indices, index_type), builder.constant(lut), 0)
        return builder.scatter(values, bitmask)
    return builder.scatter(builder.constant(kept), bitmask)


def _quantized(builder: Builder, kept: Tensor, bitmask: Any, rank: int, dtype: DType) -> Any:
    quantized = scaled_symmetric(kept, dtype)
    if quantized.zero_point.float().any():
        # The zeros between the values are no zeros of the quantized type: they are put in afterwards.
        return builder.scatter(quantized.build(builder), bitmask)
    stored = element_type(dtype)
    dense = builder.scatter(builder.constant(quantized.data, stored), bitmask)
    shape = [1] * rank
    scale, zero_point = quantized.scale.reshape(shape), quantized.zero_point.reshape(shape)
    return builder.shift_scale(dense, builder.constant(scale), builder.constant(zero_point, stored))
