"""Differentiable k-means on a GPU: attention over a block's centroids, computed again rather than stored."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.reference.layout import from_vectors, to_vectors
from coreai_kernels.reference.soft_palettize import LEAST_MASS
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.palettes import tile_of
from coreai_kernels.wide import sum_dtype, widened

__all__ = ["soft_centroids", "soft_centroids_backward", "soft_palettize", "soft_palettize_backward"]

_PALETTIZE, _PALETTIZE_BACKWARD, _CENTROIDS, _CENTROIDS_BACKWARD = range(4)
# As constants that kernels may read.
PALETTIZE_BACKWARD = tl.constexpr(_PALETTIZE_BACKWARD)
CENTROIDS = tl.constexpr(_CENTROIDS)
CENTROIDS_BACKWARD = tl.constexpr(_CENTROIDS_BACKWARD)


@triton.jit
def _distance(here, valid, center, DIM: tl.constexpr, TILE: tl.constexpr):
    distance = tl.zeros([TILE], tl.float32)
    for entry in tl.static_range(DIM):
        x = tl.load(here + entry, mask=valid, other=0.0).to(tl.float32)
        difference = x - tl.load(center + entry)
        distance += difference * difference
    return distance


@triton.jit
def _slope(here, valid, center, offset, DIM: tl.constexpr, TILE: tl.constexpr):
    """Gradient to the attention of one cluster: the vectors here times its row, less its offset."""
    u = tl.zeros([TILE], tl.float32) - offset
    for entry in tl.static_range(DIM):
        u += tl.load(here + entry, mask=valid, other=0.0).to(tl.float32) * tl.load(center + entry)
    return u


@triton.jit
def _soft(
    weight,
    table,
    grad,
    rates,
    offsets,
    output,
    sums,
    masses,
    sharpness,
    count,
    tiles,
    STEP: tl.constexpr,
    CLUSTERS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // tiles
    at = program % tiles * TILE + tl.arange(0, TILE)
    valid = at < count
    start = (block.to(tl.int64) * count + at) * DIM
    x = weight + start
    centers = table + block * CLUSTERS * DIM

    least = tl.full([TILE], float("inf"), tl.float32)
    for j in range(CLUSTERS):
        least = tl.minimum(least, _distance(x, valid, centers + j * DIM, DIM, TILE))
    total = tl.zeros([TILE], tl.float32)
    mean = tl.zeros([TILE], tl.float32)
    for j in range(CLUSTERS):
        e = tl.exp((least - _distance(x, valid, centers + j * DIM, DIM, TILE)) * sharpness)
        total += e
        if STEP == PALETTIZE_BACKWARD:
            mean += e * _slope(grad + start, valid, centers + j * DIM, 0.0, DIM, TILE)
        if STEP == CENTROIDS_BACKWARD:
            offset = tl.load(offsets + block * CLUSTERS + j)
            mean += e * _slope(x, valid, rates + (block * CLUSTERS + j) * DIM, offset, DIM, TILE)
    share = tl.where(valid, 1.0 / total, 0.0)
    mean = mean * share

    if STEP != CENTROIDS:  # outputs: one entry of the vectors after the other
        for entry in tl.static_range(DIM):
            y = tl.zeros([TILE], tl.float32)
            for j in range(CLUSTERS):
                center = centers + j * DIM
                a = tl.exp((least - _distance(x, valid, center, DIM, TILE)) * sharpness) * share
                if STEP == PALETTIZE_BACKWARD:
                    p = a * (_slope(grad + start, valid, center, 0.0, DIM, TILE) - mean)
                    y += 2.0 * sharpness * p * tl.load(center + entry)
                elif STEP == CENTROIDS_BACKWARD:
                    rate = rates + (block * CLUSTERS + j) * DIM
                    offset = tl.load(offsets + block * CLUSTERS + j)
                    p = a * (_slope(x, valid, rate, offset, DIM, TILE) - mean)
                    y += a * tl.load(rate + entry) + 2.0 * sharpness * p * tl.load(center + entry)
                else:
                    y += a * tl.load(center + entry)
            tl.store(output + start + entry, y.to(output.dtype.element_ty), mask=valid)

    if STEP != 0:  # sums over the tile, for each cluster
        for j in range(CLUSTERS):
            center = centers + j * DIM
            row = (program.to(tl.int64) * CLUSTERS + j) * DIM
            a = tl.exp((least - _distance(x, valid, center, DIM, TILE)) * sharpness) * share
            p = a
            if STEP == CENTROIDS:
                tl.store(masses + program.to(tl.int64) * CLUSTERS + j, tl.sum(a, 0))
            elif STEP == PALETTIZE_BACKWARD:
                p = 2.0 * sharpness * a * (_slope(grad + start, valid, center, 0.0, DIM, TILE) - mean)
            else:
                rate = rates + (block * CLUSTERS + j) * DIM
                offset = tl.load(offsets + block * CLUSTERS + j)
                p = 2.0 * sharpness * a * (_slope(x, valid, rate, offset, DIM, TILE) - mean)
            for entry in tl.static_range(DIM):
                value = tl.load(x + entry, mask=valid, other=0.0).to(tl.float32)
                if STEP == CENTROIDS:
                    tl.store(sums + row + entry, tl.sum(a * value, 0))
                else:
                    moment = p * (value - tl.load(center + entry))
                    if STEP == PALETTIZE_BACKWARD:
                        moment += a * tl.load(grad + start + entry, mask=valid, other=0.0).to(tl.float32)
                    tl.store(sums + row + entry, tl.sum(moment, 0))


class _Problem:
    """A weight with its palettes, an output like it, and sums over each tile."""

    def __init__(self, weight: Tensor, centroids: Tensor, temperature: float, block_size: list[int]) -> None:
        self.weight, self.block_size = weight, tuple(block_size)
        self.blocks, self.clusters, self.dim = centroids.shape
        self.vectors = self.as_vectors(weight)
        self.table = centroids.float().contiguous()
        self.sharpness = min(1.0 / temperature, torch.finfo(torch.float32).max / 2)

    def as_vectors(self, x: Tensor) -> Tensor:
        vectors = to_vectors(x, self.block_size, self.dim).contiguous()
        return vectors.float() if vectors.dtype == torch.float64 else vectors

    def run(self, step: int, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output like the weight, and sums ``(blocks, clusters, dim)`` and masses in ``sum_dtype``."""
        count = self.vectors.size(1)
        tile = tile_of(count)
        tiles = triton.cdiv(count, tile)
        none = self.table
        output = torch.empty_like(self.vectors) if step != _CENTROIDS else none
        rows = (self.blocks, tiles, self.clusters)
        sums = self.table.new_empty(*rows, self.dim) if step != _PALETTIZE else none
        masses = self.table.new_empty(rows) if step == _CENTROIDS else none
        if self.vectors.numel():
            constants: dict[str, Any] = {"CLUSTERS": self.clusters, "DIM": self.dim, "TILE": tile}
            launch(
                _soft,
                self.blocks * tiles,
                self.vectors,
                self.vectors,
                self.table,
                inputs.get("grad", none),
                inputs.get("rates", none),
                inputs.get("offsets", none),
                output,
                sums,
                masses,
                self.sharpness,
                count,
                tiles,
                STEP=step,
                warps=8,
                **constants,
            )
        if step == _PALETTIZE:
            return output, none, none
        dtype = sum_dtype(sums.device)
        return output, sums.sum(1, dtype=dtype), masses.sum(1, dtype=dtype) if step == _CENTROIDS else none

    def like_weight(self, output: Tensor) -> Tensor:
        result = from_vectors(output, self.weight.shape, self.block_size)
        like = torch.empty_like(self.weight)
        same = result.dtype == like.dtype and result.stride() == like.stride()
        return result if same else like.copy_(result)


def soft_palettize(weight: Tensor, centroids: Tensor, temperature: float, block_size: list[int]) -> Tensor:
    """See ``reference/soft_palettize.py``."""
    problem = _Problem(weight, centroids, temperature, block_size)
    return problem.like_weight(problem.run(_PALETTIZE)[0])


def soft_palettize_backward(
    grad: Tensor, weight: Tensor, centroids: Tensor, temperature: float, block_size: list[int]
) -> tuple[Tensor, Tensor]:
    """See ``reference/soft_palettize.py``."""
    problem = _Problem(weight, centroids, temperature, block_size)
    output, sums, _ = problem.run(_PALETTIZE_BACKWARD, grad=problem.as_vectors(grad))
    return problem.like_weight(output), sums.float()


def soft_centroids(
    weight: Tensor, centroids: Tensor, temperature: float, block_size: list[int]
) -> tuple[Tensor, Tensor]:
    """See ``reference/soft_palettize.py``."""
    problem = _Problem(weight, centroids, temperature, block_size)
    _, sums, masses = problem.run(_CENTROIDS)
    stays = (masses < LEAST_MASS).unsqueeze(2)
    moved = torch.where(stays, widened(problem.table), sums / masses.unsqueeze(2))
    return moved.float(), masses.float()


def soft_centroids_backward(
    grad: Tensor,
    moved: Tensor,
    mass: Tensor,
    weight: Tensor,
    centroids: Tensor,
    temperature: float,
    block_size: list[int],
) -> tuple[Tensor, Tensor]:
    """See ``reference/soft_palettize.py``."""
    problem = _Problem(weight, centroids, temperature, block_size)
    stays = (mass < LEAST_MASS).unsqueeze(2)
    rates = torch.where(stays, 0.0, grad.float() / mass.unsqueeze(2)).contiguous()
    offsets = (rates * moved).sum(2).contiguous()
    output, sums, _ = problem.run(_CENTROIDS_BACKWARD, rates=rates, offsets=offsets)
    return problem.like_weight(output), (sums + torch.where(stays, widened(grad), 0.0)).float()
