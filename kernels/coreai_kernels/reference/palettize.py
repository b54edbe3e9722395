"""Nearest centroid of every weight, or of every vector of weights."""

import torch
from torch import Tensor

from coreai_kernels.reference.kmeans_1d import round_decimals
from coreai_kernels.reference.layout import from_vectors, in_format_of, to_vectors

__all__ = ["bounds_before_rounding", "decision_bounds", "palettize"]


def decision_bounds(centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nearest of some scalar centroids changes.

    Args:
        centroids: float32 tensor ``(blocks, k)`` in any order.

    Returns:
        Bounds, float32 ``(blocks, k - 1)``, ascending, and indices, int64 ``(blocks, k)``: a value that
        exceeds ``p`` of the bounds belongs to the centroid ``indices[:, p]``. A bound is the largest float32
        not above the midpoint of two neighbours, or, where the upper one has the lower index, below it: a
        value midway goes to the lower index. Of equal centroids only the first is ever chosen.

    Midpoints are those of float64 sums.
    """
    values, order = (centroids + 0.0).sort(dim=1, stable=True)  # -0.0 equals 0.0
    low, high = values[:, :-1], values[:, 1:]
    repeats = torch.zeros_like(values, dtype=torch.bool)
    repeats[:, 1:] = values[:, 1:] == values[:, :-1]
    position = torch.arange(values.size(1), device=values.device).expand_as(order)
    first = torch.where(repeats, 0, position).cummax(1).values
    indices = order.gather(1, first)

    bounds, beyond = _midpoints(low, high)
    goes_up = (indices[:, 1:] < indices[:, :-1]) & (beyond == 0)
    down = torch.nextafter(bounds, torch.full_like(bounds, -torch.inf))
    return torch.where((beyond < 0) | goes_up, down, bounds), indices


def _midpoints(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 next to ``(low + high) / 2``, and the sign of what that is beyond it.

    The sum is rounded to float64, without the type, which not every device has: what the float32 sum leaves
    over (Knuth's TwoSum) counts unless it is less than half of float64's last place.
    """
    # So that no sum overflows; halves of what is small beside the other bound do not matter.
    large = torch.maximum(low.abs(), high.abs()) >= 2.0**126
    a, b = torch.where(large, low / 2, low), torch.where(large, high / 2, high)
    total = a + b
    part = total - a
    rest = (a - (total - part)) + (b - part)
    power = (total.view(torch.int32) & 0x7F800000).view(torch.float32)
    # Towards zero from a power of two, numbers lie twice as dense.
    shrinks = (total.abs() == power) & (torch.sign(rest) == -torch.sign(total))
    last_place = power * torch.where(shrinks, 2.0**-54, 2.0**-53)
    sign = torch.where(rest.abs() > last_place, torch.sign(rest), 0.0)
    half = torch.where(large, total, total / 2)
    doubled = torch.where(large, half, half + half)
    return half, torch.where(doubled == total, sign, torch.sign(total - doubled))


def bounds_before_rounding(bounds: Tensor, decimals: int) -> Tensor:
    """The largest float32 values that are not above ``bounds`` once they are rounded to decimal places.

    Rounding keeps the order of values: what exceeds these bounds is what exceeds the given ones after it. So
    a backend rounds a few bounds in the place of all elements. Found by halving the range of float32.
    """
    low = torch.full_like(bounds, -torch.inf).view(torch.int32).long()
    high = torch.full_like(bounds, torch.inf).view(torch.int32).long()
    least = torch.iinfo(torch.int32).min

    def turned(bits: Tensor) -> Tensor:
        # Between bits and numbers that ascend as the values do, both ways.
        return torch.where(bits < 0, least - bits - 1, bits)

    low, high = turned(low), turned(high)
    for _ in range(32):
        middle = (low + high).div(2, rounding_mode="floor")
        values = turned(middle).to(torch.int32).view(torch.float32)
        below = round_decimals(values, decimals) <= bounds
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    found = turned(low).to(torch.int32).view(torch.float32)
    return torch.where(bounds == torch.inf, bounds, found)


def palettize(
    weight: Tensor, centroids: Tensor, block_size: tuple[int, ...], decimals: int | None = None
) -> Tensor:
    """Indices, uint8, of the nearest of the block's centroids ``(blocks, k, dim)``.

    Scalars (``dim`` 1), rounded to ``decimals`` if these are given, compare with the midpoints between
    centroids; NaN exceeds none. Vectors have squared distances, summed in float32 from the first entry on;
    the first smallest wins, and NaN is never smaller.
    """
    dim = centroids.size(2)
    vectors = to_vectors(weight, block_size, dim).float()
    table = centroids.float()
    if dim == 1:
        bounds, indices = decision_bounds(table[:, :, 0])
        # searchsorted ranks NaN last, and comparisons rank it first.
        values = vectors[:, :, 0] if decimals is None else round_decimals(vectors[:, :, 0], decimals)
        values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        bounds = bounds.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        nearest = indices.gather(1, torch.searchsorted(bounds, values.contiguous()))
    else:
        nearest = _nearest_vector(vectors, table)
    shape = (weight.size(0) // dim, *weight.shape[1:]) if weight.dim() else ()
    blocks = (block_size[0] // dim, *block_size[1:]) if weight.dim() else ()
    result = from_vectors(nearest.to(torch.uint8).unsqueeze(2), shape, blocks)
    return in_format_of(weight, result, torch.uint8) if dim == 1 else result.contiguous()


def _nearest_vector(vectors: Tensor, table: Tensor) -> Tensor:
    """Index of the first nearest row of ``table (blocks, k, dim)`` for ``vectors (blocks, n, dim)``."""
    least = torch.full(vectors.shape[:2], torch.inf, device=vectors.device)
    nearest = torch.zeros_like(least, dtype=torch.int64)
    for index in range(table.size(1)):
        distance = torch.zeros_like(least)
        for entry in range(table.size(2)):
            difference = vectors[:, :, entry] - table[:, index, entry, None]
            distance += difference * difference
        less = distance < least
        nearest = torch.where(less, index, nearest)
        least = torch.where(less, distance, least)
    return nearest
