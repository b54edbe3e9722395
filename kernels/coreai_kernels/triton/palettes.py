"""Palettes on a GPU: ``palettize``, ``lookup`` and its gradient.

The kernels take a weight as ``(blocks, vectors, dim)``: a view of it unless blocks are groups of columns, a
vector has several entries, or its memory is in another order. A program works on a tile of one block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.reference.layout import from_vectors, to_vectors
from coreai_kernels.reference.palettize import bounds_before_rounding, decision_bounds
from coreai_kernels.triton.launch import launch
from coreai_kernels.wide import sum_dtype

__all__ = ["lookup", "lookup_backward", "lookup_packed", "palettize", "tile_of"]

# Sums over clusters: how many clusters a program looks at, and how many vectors.
_CLUSTERS = 16
_PART = 8192
# Whole numbers of so many bytes.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def tile_of(count: int, largest: int = 1024) -> int:
    """Elements a program takes: a power of two, fewer if a block is small."""
    return int(min(largest, max(64, triton.next_power_of_2(count))))


def _index_shape(shape: torch.Size | list[int], dim: int) -> tuple[int, ...]:
    return (shape[0] // dim, *shape[1:]) if len(shape) else ()


@triton.jit
def _nearest_scalars(
    weight, bounds, order, indices, count, tiles, CLUSTERS: tl.constexpr, TILE: tl.constexpr
):
    program = tl.program_id(0)
    block = program // tiles
    at = program % tiles * TILE + tl.arange(0, TILE)
    valid = at < count
    x = tl.load(weight + block.to(tl.int64) * count + at, mask=valid, other=0.0).to(tl.float32)
    position = tl.zeros([TILE], tl.int32)
    for j in range(CLUSTERS - 1):
        position += (x > tl.load(bounds + block * (CLUSTERS - 1) + j)).to(tl.int32)
    index = tl.load(order + block * CLUSTERS + position)
    tl.store(indices + block.to(tl.int64) * count + at, index, mask=valid)


@triton.jit
def _nearest_vectors(
    weight, table, indices, count, tiles, CLUSTERS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr
):
    program = tl.program_id(0)
    block = program // tiles
    at = program % tiles * TILE + tl.arange(0, TILE)
    valid = at < count
    here = weight + (block.to(tl.int64) * count + at) * DIM
    least = tl.full([TILE], float("inf"), tl.float32)
    nearest = tl.zeros([TILE], tl.int32)
    for j in range(CLUSTERS):
        distance = tl.zeros([TILE], tl.float32)
        for entry in tl.static_range(DIM):
            x = tl.load(here + entry, mask=valid, other=0.0).to(tl.float32)
            difference = x - tl.load(table + (block * CLUSTERS + j) * DIM + entry)
            distance += difference * difference
        less = distance < least
        nearest = tl.where(less, j, nearest)
        least = tl.where(less, distance, least)
    tl.store(indices + block.to(tl.int64) * count + at, nearest.to(tl.uint8), mask=valid)


@triton.jit
def _lookup(
    indices,
    table,
    kept,
    output,
    count,
    size,
    tiles,
    CLUSTERS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    SIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """``count`` elements a block; ``size`` bytes of packed indices, if they are packed.

    With SIGN, the bit of a word that holds it, words are whole numbers: only that bit is left where nothing
    is ``kept``.
    """
    program = tl.program_id(0)
    block = program // tiles
    at = program % tiles * TILE + tl.arange(0, TILE)
    valid = at < count
    vector = block.to(tl.int64) * (count // DIM) + at // DIM
    if BITS == 8:
        index = tl.load(indices + vector, mask=valid, other=0).to(tl.int32)
    else:
        bit = vector * BITS
        byte = bit // 8
        low = tl.load(indices + byte, mask=valid, other=0).to(tl.int32)
        straddles = valid & (bit % 8 + BITS > 8) & (byte + 1 < size)
        high = tl.load(indices + byte + 1, mask=straddles, other=0).to(tl.int32)
        index = ((low | (high << 8)) >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    index = tl.minimum(index, CLUSTERS - 1)
    value = tl.load(table + (block * CLUSTERS + index) * DIM + at % DIM, mask=valid)
    if SIGN != 0:
        here = tl.load(kept + block.to(tl.int64) * count + at, mask=valid, other=0)
        value = tl.where(here != 0, value, value & SIGN)
    tl.store(output + block.to(tl.int64) * count + at, value, mask=valid)


@triton.jit
def _sum_by_index(
    grad,
    indices,
    partial,
    count,
    parts,
    groups,
    CLUSTERS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of one part of a block for GROUP of its clusters, always in the same order."""
    program = tl.program_id(0)
    group = program % groups
    part = program // groups % parts
    block = program // groups // parts
    cluster = group * GROUP + tl.arange(0, GROUP)
    for entry in tl.static_range(DIM):
        total = tl.zeros([GROUP], tl.float32)
        for start in range(0, PART, TILE):
            at = part * PART + start + tl.arange(0, TILE)
            vector = block.to(tl.int64) * count + at
            index = tl.load(indices + vector, mask=at < count, other=255).to(tl.int32)
            g = tl.load(grad + vector * DIM + entry, mask=at < count, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(index[:, None] == cluster[None, :], g[:, None], 0.0), 0)
        place = ((block.to(tl.int64) * parts + part) * CLUSTERS + cluster) * DIM + entry
        tl.store(partial + place, total, mask=cluster < CLUSTERS)


def palettize(
    weight: Tensor, centroids: Tensor, block_size: list[int], decimals: int | None = None
) -> Tensor:
    """See ``reference/palettize.py``."""
    blocks, clusters, dim = centroids.shape
    vectors = to_vectors(weight, tuple(block_size), dim).contiguous()
    if vectors.dtype == torch.float64:
        vectors = vectors.float()
    count = vectors.size(1)
    nearest = torch.empty(blocks, count, 1, dtype=torch.uint8, device=weight.device)
    tile = tile_of(count)
    tiles = triton.cdiv(count, tile)
    table = centroids.float().contiguous()
    sizes = {"CLUSTERS": clusters, "TILE": tile, "warps": 4}
    if nearest.numel() and dim == 1:
        bounds, order = decision_bounds(table[:, :, 0])
        order = order.to(torch.uint8)
        if decimals is not None:
            bounds = bounds_before_rounding(bounds, decimals)
        launch(
            _nearest_scalars, blocks * tiles, weight, vectors, bounds, order, nearest, count, tiles, **sizes
        )
    elif nearest.numel():
        launch(
            _nearest_vectors, blocks * tiles, weight, vectors, table, nearest, count, tiles, DIM=dim, **sizes
        )
    shape = _index_shape(weight.shape, dim)
    result = from_vectors(nearest, shape, _index_shape(block_size, dim))
    if dim > 1:
        return result.contiguous()
    like = torch.empty_like(weight, dtype=torch.uint8)
    return result if result.stride() == like.stride() else like.copy_(result)


def _look_up(indices: Tensor, centroids: Tensor, count: int, bits: int, kept: Tensor | None = None) -> Tensor:
    """``(blocks, count, dim)`` from indices in the blocks' order, in which ``kept`` are, too."""
    blocks, clusters, dim = centroids.shape
    output = centroids.new_empty(blocks, count, dim)
    words = _WORDS[centroids.element_size()]
    tile = tile_of(count * dim)
    tiles = triton.cdiv(count * dim, tile)
    if output.numel():
        launch(
            _lookup,
            blocks * tiles,
            output,
            indices,
            centroids.contiguous() if kept is None else centroids.contiguous().view(words),
            indices if kept is None else kept,
            output if kept is None else output.view(words),
            count * dim,
            indices.numel(),
            tiles,
            CLUSTERS=clusters,
            DIM=dim,
            BITS=bits,
            SIGN=0 if kept is None else torch.iinfo(words).min,
            TILE=tile,
            warps=4,
        )
    return output


def lookup(indices: Tensor, centroids: Tensor, block_size: list[int], mask: Tensor | None = None) -> Tensor:
    """See ``reference/lookup.py``."""
    dim = centroids.size(2)
    flat = to_vectors(indices, _index_shape(block_size, dim)).contiguous()
    kept = None
    if mask is not None:
        kept = to_vectors(mask, tuple(block_size)).contiguous().view(torch.uint8)
    shape = (indices.size(0) * dim, *indices.shape[1:]) if indices.dim() else ()
    result = from_vectors(_look_up(flat, centroids, flat.size(1), 8, kept), shape, tuple(block_size))
    if dim > 1:
        return result.contiguous()
    like = torch.empty_like(indices, dtype=centroids.dtype)
    return result if result.stride() == like.stride() else like.copy_(result)


def lookup_packed(
    packed: Tensor, centroids: Tensor, shape: list[int], block_size: list[int], bits: int
) -> Tensor:
    """See ``reference/lookup.py``."""
    from coreai_kernels.triton.bits import unpack_bits

    dim = centroids.size(2)
    whole_rows = list(block_size[1:]) == list(shape[1:])
    if whole_rows and (dim == 1 or centroids.size(0) * block_size[0] == shape[0] == dim):
        count = torch.Size(shape).numel() // max(1, centroids.size(0)) // dim
        output = _look_up(packed.contiguous(), centroids, count, int(bits))
        return from_vectors(output, tuple(shape), tuple(block_size)).contiguous()
    rows = _index_shape(shape, dim)
    indices = unpack_bits(packed, bits, torch.Size(rows).numel(), False).reshape(rows)
    return lookup(indices, centroids, block_size)


def lookup_backward(
    grad: Tensor, indices: Tensor, block_size: list[int], num_clusters: int, dim: int
) -> Tensor:
    """See ``reference/lookup.py``. Sums of float32 within a part, of float64 over the parts."""
    flat = to_vectors(indices, _index_shape(block_size, dim)).contiguous()
    vectors = to_vectors(grad, tuple(block_size), dim).contiguous()
    blocks, count, _ = flat.shape
    parts = max(1, triton.cdiv(count, _PART))
    groups = triton.cdiv(num_clusters, _CLUSTERS)
    partial = torch.zeros(blocks, parts, num_clusters, dim, device=grad.device)
    if flat.numel():
        part = min(_PART, tile_of(count, _PART))
        launch(
            _sum_by_index,
            blocks * parts * groups,
            grad,
            vectors,
            flat,
            partial,
            count,
            parts,
            groups,
            CLUSTERS=num_clusters,
            DIM=dim,
            GROUP=_CLUSTERS,
            PART=part,
            TILE=min(part, 256),
            warps=4,
        )
    return partial.sum(1, dtype=sum_dtype(grad.device)).float()
