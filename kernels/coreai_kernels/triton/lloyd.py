"""Lloyd's iterations on a GPU: all blocks of all tries at once.

An iteration is two kernels. The first takes a part of a block's vectors a program: it assigns them, going
through the centroids one by one, and sums over its part of each cluster. The second adds the parts up in
order, moves the centroids and says which tries go on. So nothing depends on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.reference.kmeans import STRIDE
from coreai_kernels.triton.launch import launch, multiprocessors

__all__ = ["lloyd"]

# Vectors that a program assigns at a time, clusters that it sums over at a time, and programs a
# multiprocessor.
_TILE, _GROUP, _PROGRAMS = 256, 16, 4
# How often the host asks whether a try still moves.
_ASKED_EVERY = 8


@triton.jit
def _assign_and_sum(
    vectors,
    mass,
    centroids,
    moving,
    indices,
    sums,
    masses,
    count,
    blocks,
    parts,
    length,
    HAS_MASS: tl.constexpr,
    SPREAD: tl.constexpr,
    CLUSTERS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Assigns a part of ``length`` vectors, and sums these; or, to measure SPREAD, squared differences.

    ``sums`` is float64 ``(tasks, parts, CLUSTERS, DIM)``, ``masses`` without the last axis.
    """
    program = tl.program_id(0)
    task, part = program // parts, program % parts
    if tl.load(moving + task) == 0:
        return
    block = (task % blocks).to(tl.int64)
    first, last = part * length, tl.minimum(part * length + length, count)
    table = centroids + task * CLUSTERS * DIM
    own = indices + task.to(tl.int64) * count
    if not SPREAD:
        for start in range(first, last, TILE):
            at = start + tl.arange(0, TILE)
            least = tl.full([TILE], float("inf"), tl.float32)
            nearest = tl.zeros([TILE], tl.int32)
            for j in range(CLUSTERS):
                distance = tl.zeros([TILE], tl.float32)
                for entry in tl.static_range(DIM):
                    x = tl.load(vectors + (block * DIM + entry) * count + at, mask=at < last, other=0.0)
                    difference = x - tl.load(table + j * DIM + entry)
                    distance += difference * difference
                less = distance < least
                nearest = tl.where(less, j, nearest)
                least = tl.where(less, distance, least)
            tl.store(own + at, nearest.to(tl.uint8), mask=at < last)
        # The sums read what other threads of the program wrote.
        tl.debug_barrier()
    for group in range(0, CLUSTERS, GROUP):
        cluster = group + tl.arange(0, GROUP)
        place = (program.to(tl.int64) * CLUSTERS) + cluster
        for entry in tl.static_range(DIM):
            total = tl.zeros([GROUP], tl.float64)
            for start in range(first, last, TILE):
                at = start + tl.arange(0, TILE)
                index = tl.load(own + at, mask=at < last, other=0).to(tl.int32)
                x = tl.load(vectors + (block * DIM + entry) * count + at, mask=at < last, other=0.0).to(
                    tl.float64
                )
                if SPREAD:
                    x -= tl.load(table + index * DIM + entry, mask=at < last, other=0.0).to(tl.float64)
                    x = x * x
                if HAS_MASS:
                    x *= tl.load(mass + block * count + at, mask=at < last, other=0.0).to(tl.float64)
                total += tl.sum(tl.where(index[:, None] == cluster[None, :], x[:, None], 0.0), 0)
            tl.store(sums + place * DIM + entry, total, mask=cluster < CLUSTERS)
        if not SPREAD:
            total = tl.zeros([GROUP], tl.float64)
            for start in range(first, last, TILE):
                at = start + tl.arange(0, TILE)
                index = tl.load(own + at, mask=at < last, other=0).to(tl.int32)
                if HAS_MASS:
                    m = tl.load(mass + block * count + at, mask=at < last, other=0.0).to(tl.float64)
                    total += tl.sum(tl.where(index[:, None] == cluster[None, :], m[:, None], 0.0), 0)
                else:
                    here = (index[:, None] == cluster[None, :]) & (at < last)[:, None]
                    total += tl.sum(here.to(tl.int32), 0).to(tl.float64)
            tl.store(masses + place, total, mask=cluster < CLUSTERS)


@triton.jit
def _move(
    centroids,
    settled,
    moving,
    strides,
    last,
    center,
    total,
    sums,
    masses,
    whole_masses,
    blocks,
    parts,
    tolerance,
    STRIDE: tl.constexpr,
    CLUSTERS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """One try for one block: see ``reference/kmeans.py``."""
    task = tl.program_id(0)
    if tl.load(moving + task) == 0:
        return
    block = task % blocks
    cluster, entry = tl.arange(0, PADDED), tl.arange(0, PADDED_DIM)
    here = cluster[:, None] * DIM + entry[None, :]
    inside = (cluster < CLUSTERS)[:, None] & (entry < DIM)[None, :]
    whole = tl.zeros([PADDED, PADDED_DIM], tl.float64)
    mass = tl.zeros([PADDED], tl.float64)
    for part in range(parts):
        place = (task.to(tl.int64) * parts + part) * CLUSTERS
        whole += tl.load(sums + place * DIM + here, mask=inside, other=0.0)
        mass += tl.load(masses + place + cluster, mask=cluster < CLUSTERS, other=0.0)
    filled = (mass > 0)[:, None] & inside
    share = tl.where(mass > 0, mass, 1.0)[:, None]
    around = (
        whole - mass[:, None] * tl.load(center + block * DIM + entry, mask=entry < DIM, other=0.0)[None, :]
    )
    gain = tl.sum(tl.sum(tl.where(filled, around * around / share, 0.0), 1), 0)
    rest = tl.maximum(tl.load(total + block) - gain, 0.0)
    gains = gain - tl.load(last + task) > tolerance * rest
    strode = tl.load(strides + task) != 0
    strides_on = strode & gains

    own = task * CLUSTERS * DIM + here
    before = tl.load(centroids + own, mask=inside, other=0.0).to(tl.float64)
    mean = tl.where(filled, whole / share, before)
    beyond = tl.where(strides_on, before + STRIDE * (mean - before), mean)
    tl.store(settled + own, mean.to(tl.float32), mask=inside)
    tl.store(centroids + own, beyond.to(tl.float32), mask=inside)
    tl.store(whole_masses + task * CLUSTERS + cluster, mass, mask=cluster < CLUSTERS)
    tl.store(moving + task, (gains | strode).to(tl.uint8))
    tl.store(strides + task, strides_on.to(tl.uint8))
    tl.store(last + task, gain)


def lloyd(
    vectors: Tensor,
    mass: Tensor | None,
    centroids: Tensor,
    center: Tensor,
    total: Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference/kmeans.py``. Waits for the device now and then."""
    tries, blocks, clusters, dim = centroids.shape
    count, tasks = vectors.size(2), tries * blocks
    shape = (tries, blocks, clusters)
    settled = centroids.float().contiguous().clone()
    if not tasks:
        return settled, settled.new_zeros(shape).double(), torch.zeros_like(settled, dtype=torch.float64)
    wanted = triton.cdiv(_PROGRAMS * multiprocessors(vectors), tasks)
    length = max(4 * _TILE, triton.next_power_of_2(triton.cdiv(count, wanted)))
    parts = max(1, triton.cdiv(count, length))
    current = settled.clone()
    moving = torch.ones(tasks, dtype=torch.uint8, device=vectors.device)
    strides, every = torch.ones_like(moving), torch.ones_like(moving)
    last = torch.full((tasks,), -torch.inf, dtype=torch.float64, device=vectors.device)
    indices = torch.empty(tasks, count, dtype=torch.uint8, device=vectors.device)
    sums = last.new_empty(tasks, parts, clusters, dim)
    masses = last.new_empty(tasks, parts, clusters)
    whole_masses = last.new_empty(shape)
    vectors = vectors.contiguous()
    weights = vectors if mass is None else mass.contiguous()

    def assign_and_sum(table: Tensor, which: Tensor, spread: bool) -> None:
        launch(
            _assign_and_sum,
            tasks * parts,
            vectors,
            *(vectors, weights, table, which, indices, sums, masses, count, blocks, parts, length),
            HAS_MASS=mass is not None,
            SPREAD=spread,
            CLUSTERS=clusters,
            DIM=dim,
            GROUP=_GROUP,
            TILE=_TILE,
            warps=4,
        )

    if not max_iterations:
        assign_and_sum(current, every, False)
        whole_masses = masses.sum(1).reshape(shape)
    for iteration in range(max_iterations):
        assign_and_sum(current, moving, False)
        launch(
            _move,
            tasks,
            vectors,
            *(current, settled, moving, strides, last, center.contiguous(), total.contiguous()),
            *(sums, masses, whole_masses, blocks, parts, tolerance),
            STRIDE=STRIDE,
            CLUSTERS=clusters,
            DIM=dim,
            PADDED=triton.next_power_of_2(clusters),
            PADDED_DIM=triton.next_power_of_2(dim),
            warps=4,
        )
        if iteration % _ASKED_EVERY == _ASKED_EVERY - 1 and not moving.any():
            break
    assign_and_sum(settled, every, True)
    return settled, whole_masses, sums.sum(1).reshape(settled.shape)
