"""Argument checks shared by the operations: errors that name the argument, what it was and what it may be."""

import functools
import math

import torch
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.types import Scheme, grid_shape

__all__ = [
    "INPUT_DTYPES",
    "check_axis",
    "check_blocks",
    "check_centroids",
    "check_decimals",
    "check_float_input",
    "check_num_clusters",
    "check_num_keep",
    "check_params",
    "check_scale_format",
    "check_range",
    "check_vectors",
]

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_cached_grid_shape = functools.lru_cache(maxsize=4096)(grid_shape)


def check_axis(tensor: Tensor, axis: int) -> int:
    """``axis`` counted from the front; IndexError if the tensor has no such axis."""
    if not -tensor.dim() <= axis < tensor.dim():
        raise IndexError(f"axis {axis} is out of range for shape {tuple(tensor.shape)}")
    return axis % tensor.dim()


def check_blocks(name: str, tensor: Tensor, block_size: tuple[int, ...]) -> tuple[int, ...]:
    """Grid shape of ``tensor``; ValueError if the blocks do not tile it."""
    try:
        if torch.compiler.is_compiling():
            return grid_shape(tensor.shape, block_size)
        return _cached_grid_shape(tensor.shape, block_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check_centroids(centroids: Tensor, shape: tuple[int, ...], block_size: tuple[int, ...]) -> None:
    """ValueError or TypeError unless there is a palette ``(blocks, k, dim)`` for each block of a weight."""
    check_float_input("centroids", centroids)
    if centroids.dim() != 3 or not 1 <= centroids.size(1) <= 256 or centroids.size(2) < 1:
        raise ValueError(
            "centroids must have shape (blocks, clusters, cluster_dim), with 1 to 256 clusters; "
            f"got {tuple(centroids.shape)}"
        )
    check_vectors("centroids' cluster_dim", centroids.size(2), block_size)
    try:
        blocks = math.prod(grid_shape(shape, block_size))
    except ValueError as error:
        raise ValueError(f"block_size: {error}") from None
    if centroids.size(0) != blocks:
        raise ValueError(
            f"centroids must have one palette per block, {blocks} for block_size {tuple(block_size)} "
            f"and shape {tuple(shape)}; got {centroids.size(0)}"
        )


def check_decimals(decimals: int | None) -> None:
    """ValueError unless float32 has the power of ten."""
    if decimals is not None and not -30 <= decimals <= 30:
        raise ValueError(f"decimals must be in -30..30; got {decimals}")


def check_num_clusters(num_clusters: int, block_size: tuple[int, ...], dim: int = 1) -> None:
    """ValueError unless eight bits can name each cluster, and a block has a value (a vector) for each."""
    if not 1 <= num_clusters <= 256:
        raise ValueError(f"num_clusters must be in 1..256; got {num_clusters}")
    available = math.prod(block_size) // dim
    if num_clusters > available:
        what = "values" if dim == 1 else f"vectors of {dim} values"
        raise ValueError(
            f"num_clusters must be at most {available}, for a block of shape {tuple(block_size)} has so many "
            f"{what}; got {num_clusters}"
        )


def check_vectors(name: str, dim: int, block_size: tuple[int, ...]) -> None:
    """ValueError unless vectors of ``dim`` entries of axis 0 tile the blocks."""
    rows = block_size[0] if len(block_size) else 1
    if dim < 1 or rows % dim:
        raise ValueError(f"{name} must divide the {rows} rows of a block; got {dim}")


def check_float_input(name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor is one of :data:`INPUT_DTYPES`."""
    if tensor.dtype not in INPUT_DTYPES:
        allowed = ", ".join(map(str, INPUT_DTYPES))
        raise TypeError(f"{name} must be one of {allowed}; got {tensor.dtype}")


def check_num_keep(num_keep: int, available: int, what: str) -> None:
    """ValueError unless so many can be kept."""
    if not 0 <= num_keep <= available:
        raise ValueError(
            f"num_keep must lie in [0, {available}], for there are {available} {what}; got {num_keep}"
        )


def check_range(fmt: Format, quant_min: float, quant_max: float) -> None:
    """ValueError unless ``quant_min < quant_max`` and the format can hold both."""
    if not quant_min < quant_max:
        raise ValueError(f"quant_min must be below quant_max; got [{quant_min}, {quant_max}]")
    if fmt != Format.INT:
        largest = fmt.facts.largest
        if max(-quant_min, quant_max) > largest:
            raise ValueError(
                f"[quant_min, quant_max] must lie in [-{largest}, {largest}] for {fmt.name}; "
                f"got [{quant_min}, {quant_max}]"
            )


def check_scale_format(
    scale_format: int, fmt: Format, scheme: int, quant_min: float, quant_max: float
) -> None:
    """ValueError unless the values can have such scales, which of integers only those around zero can."""
    kind = ScaleFormat(scale_format)
    if kind == ScaleFormat.FLOAT32 or fmt != Format.INT:
        return
    if not kind.facts.of_integers:
        raise ValueError(f"scale_format {kind.name} needs a floating-point format; got {fmt.name}")
    if scheme == Scheme.ASYMMETRIC or -quant_min < quant_max or quant_max < 1:
        raise ValueError(
            f"scale_format {kind.name} needs a symmetric scheme and quant_min <= -quant_max for integers; "
            f"got {Scheme(scheme).name} and [{quant_min}, {quant_max}]"
        )


def check_params(
    grid: tuple[int, ...],
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
) -> None:
    """ValueError unless all quantization parameters have the grid's shape and the input's device."""
    for name, value in (("scale", scale), ("zero_point", zero_point), ("minval", minval)):
        if value is None:
            continue
        if value.shape != grid:
            raise ValueError(
                f"{name} must have one value per block, shape {grid}; got shape {tuple(value.shape)}"
            )
        if value.device != input.device:
            raise ValueError(f"{name} must be on the input's device {input.device}; got {value.device}")
    if zero_point is not None and minval is not None:
        raise ValueError("zero_point and minval exclude each other: give the one of the formulation in use")
