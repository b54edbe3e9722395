"""Palettizes the weights of a program."""

from typing import Any

import torch
from coreai._compiler.ir import IntegerType
from coreai.authoring import AIProgram
from torch import Tensor

import coreai_kernels
from coreai_opt.coreai_utils._program import Builder, Unsuitable, Weight, check_threshold, compress
from coreai_opt.coreai_utils._quantization import element_type, scaled_symmetric
from coreai_opt.coreai_utils.common import CompressionGranularity, DType, member

__all__ = ["N_BITS", "VALUE_DTYPES", "find_palettes", "palettize_weights"]

N_BITS = (1, 2, 3, 4, 6, 8)
VALUE_DTYPES = (DType.INT8, DType.UINT8, DType.FP8_E4M3FN, DType.FP8_E5M2)
_GRANULARITIES = (
    CompressionGranularity.PER_TENSOR,
    CompressionGranularity.PER_CHANNEL,
    CompressionGranularity.PER_GROUPED_CHANNEL,
)


def palettize_weights(
    coreai_program: AIProgram,
    lut_dtype: DType | None,
    n_bits: int = 4,
    granularity: CompressionGranularity = CompressionGranularity.PER_TENSOR,
    group_size: int = 32,
    cluster_dim: int = 1,
    enable_per_channel_scale: bool = False,
    weight_num_threshold: int = 1024,
    num_kmeans_workers: int = 4,
    enable_fast_kmeans_mode: bool = True,
    rounding_precision: int = 4,
    in_place: bool = False,
) -> AIProgram:
    """Replace the weights of matrix products, convolutions and embeddings by indices into palettes.

    Palettes of scalars are the best ones (:func:`coreai_kernels.kmeans_1d`). A weight that groups or vectors
    do not divide stays as it is, with a warning in the log.

    Args:
        coreai_program: the program.
        lut_dtype: type of the palettes' values, one scale for all palettes of a weight; None for its own.
        n_bits: bits of an index: 1, 2, 3, 4, 6 or 8.
        granularity: one palette a tensor, an output channel, or a group of ``group_size`` output channels.
        group_size: output channels that share a palette.
        cluster_dim: length of the vectors that an index stands for: consecutive output channels.
        enable_per_channel_scale: divide each output channel by its largest magnitude first.
        weight_num_threshold: weights with so many elements or fewer stay.
        num_kmeans_workers: has no effect: all palettes of a weight are found at once.
        enable_fast_kmeans_mode: find palettes for values rounded to ``rounding_precision`` decimals.
        rounding_precision: decimals kept in fast mode.
        in_place: change ``coreai_program`` itself, else a copy.

    Returns:
        The program with palettized weights.

    Raises:
        TypeError: ``coreai_program`` is none.
        ValueError: an argument is not allowed, or two exclude each other.
    """
    if lut_dtype is not None:
        lut_dtype = member(DType, "lut_dtype", lut_dtype, VALUE_DTYPES)
    granularity = member(CompressionGranularity, "granularity", granularity, _GRANULARITIES)
    check_threshold(weight_num_threshold)
    if n_bits not in N_BITS:
        raise ValueError(f"n_bits must be one of {N_BITS}; got {n_bits!r}")
    for name, value in (
        ("group_size", group_size),
        ("cluster_dim", cluster_dim),
        ("num_kmeans_workers", num_kmeans_workers),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number; got {value!r}")
    if enable_per_channel_scale and cluster_dim > 1:
        raise ValueError(f"enable_per_channel_scale needs cluster_dim 1; got {cluster_dim}")
    decimals = rounding_precision if enable_fast_kmeans_mode else None

    def replacement(weight: Weight, builder: Builder) -> Any:
        channels = weight.values.shape[weight.output_axis]
        groups = {
            CompressionGranularity.PER_TENSOR: channels,
            CompressionGranularity.PER_CHANNEL: 1,
            CompressionGranularity.PER_GROUPED_CHANNEL: group_size,
        }[granularity]
        if channels % groups:
            raise Unsuitable(f"groups of {groups} channels do not divide axis {weight.output_axis}")
        if groups % cluster_dim:
            raise Unsuitable(f"vectors of {cluster_dim} channels do not divide a group of {groups}")
        scale = _channel_scale(weight) if enable_per_channel_scale else None
        scaled = weight.values if scale is None else weight.values / scale
        lut, indices = find_palettes(scaled, n_bits, weight.output_axis, groups, cluster_dim, decimals)
        return _build(builder, weight, lut, indices, scale, lut_dtype, n_bits)

    return compress(coreai_program, weight_num_threshold, in_place, replacement)


def _channel_scale(weight: Weight) -> Tensor:
    """The largest magnitude of each output channel, as wide as the weight along that axis alone."""
    axes = [axis for axis in range(weight.values.dim()) if axis != weight.output_axis]
    largest = weight.values.abs().amax(axes, keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def find_palettes(
    values: Tensor, n_bits: int, axis: int, group_size: int, cluster_dim: int, decimals: int | None
) -> tuple[Tensor, Tensor]:
    """Palettes and indices of a tensor.

    Args:
        values: floating-point tensor.
        n_bits: bits of an index.
        axis: the axis that groups and vectors lie along.
        group_size: slices along it that share a palette.
        cluster_dim: length of vectors along it.
        decimals: decimal places that values are rounded to before their palettes are found; None for all.

    Returns:
        float32 palettes ``(groups, 2 ** n_bits, cluster_dim)``, unused entries zero; and uint8 indices in the
        shape of ``values``, ``axis`` divided by ``cluster_dim``.
    """
    first = values.movedim(axis, 0)
    block = (group_size, *first.shape[1:])
    entries = 2**n_bits
    count = min(entries, group_size // cluster_dim * first[:1].numel())
    # Half precision leaves few distinct values, so that exact clustering is a matter of counting.
    halves = first.to(torch.float16)
    if cluster_dim == 1:
        centroids = coreai_kernels.kmeans_1d(halves, count, block_size=block, decimals=decimals)
    else:
        if decimals is not None:
            halves = torch.round(halves.float(), decimals=decimals)
        centroids = coreai_kernels.kmeans(halves, count, cluster_dim=cluster_dim, block_size=block)
    indices = coreai_kernels.palettize(first.contiguous(), centroids, block_size=block)
    if count < entries:
        centroids = torch.nn.functional.pad(centroids, (0, 0, 0, entries - count))
    return centroids, indices.movedim(0, axis)


def _build(
    builder: Builder,
    weight: Weight,
    palettes: Tensor,
    indices: Tensor,
    channel_scale: Tensor | None,
    lut_dtype: DType | None,
    n_bits: int,
) -> Any:
    rank, dtype = weight.values.dim(), weight.values.dtype
    groups, entries, cluster_dim = palettes.shape
    grid = [1] * rank
    grid[weight.output_axis] = groups
    index_type = IntegerType.get_unsigned(n_bits)
    stored_indices = builder.constant(indices, index_type)
    if lut_dtype is None:
        lut, scale = builder.constant(palettes.reshape(*grid, entries, cluster_dim).to(dtype)), channel_scale
    else:
        quantized = scaled_symmetric(palettes.to(dtype), lut_dtype)
        data = quantized.data.reshape(*grid, entries, cluster_dim)
        lut = builder.constant(data, element_type(lut_dtype))
        scale = quantized.scale.to(dtype).reshape([1] * rank)
        scale = scale if channel_scale is None else scale * channel_scale
    dense = builder.look_up(stored_indices, lut, weight.output_axis)
    if scale is None:
        return dense
    offset = torch.zeros_like(scale)
    if lut_dtype is not None:
        offset = offset + quantized.zero_point.to(dtype)
    dense = builder.cast(dense, builder.element_type)
    shifted = builder.shift_scale(dense, builder.constant(scale), builder.constant(offset))
    return builder.cast(shifted, builder.element_type)
