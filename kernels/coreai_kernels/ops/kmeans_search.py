"""The search behind ``kmeans``: from which centroids Lloyd's iterations end lowest.

They end in local minima, whose errors differ by percents. So there are several starts (k-means++), and the
best is improved by swaps, as in random swap clustering (Fränti, Journal of Big Data 2018), but of clusters
that promise most: two that are cheap to merge (Ward, JASA 1963) become one, and one that is wide is split.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from coreai_kernels.ops.library import implementation

__all__ = ["SMALL", "Problem", "search", "seeds"]

# Seeding looks at this many vectors a cluster, and takes the better of two: more make better seeds, but
# hardly better ends.
_SEEDS_PER_CLUSTER, _CANDIDATES = 32, 2
# Tries are seeded together, as far as distances to their candidates stay this few.
_SEEDING = 1 << 18
# Iterations at most, and the share of the error that one must gain: of many tries, and of those that matter.
# Minima differ by less than 1e-4, so that they compare only near their ends.
_ROUGH, _SHORT, _FINE = (15, 1e-3), (5, 1e-3), (200, 1e-6)
# Of the starts, one in so many goes on.
_KEPT = 4
# Of the swaps in a round, so many go on.
_PROMISING = 2
# Where an iteration has no more distances than this, a round costs more than its iterations.
SMALL = 1 << 14


class _Effort(NamedTuple):
    """Swaps in a round, rounds without success before the end, and rounds of all."""

    swaps: int
    patience: int
    rounds: int


_EFFORT, _EFFORT_IF_SMALL = _Effort(8, 6, 1 << 30), _Effort(16, 2, 8)
# Swaps are made of so many merges and so many splits, the best of either.
_CHOICES = 16


class Problem(NamedTuple):
    """Blocks of vectors, and how important each vector is.

    Attributes:
        vectors: float32 ``(blocks, dim, n)``.
        mass: float32 ``(blocks, n)``; None where all weigh the same.
        center: about the mean of each block, float64 ``(blocks, dim)``.
        total: sum of mass times squared distance to it, float64 ``(blocks,)``.
    """

    vectors: Tensor
    mass: Tensor | None
    center: Tensor
    total: Tensor

    @classmethod
    def of(cls, vectors: Tensor, mass: Tensor | None) -> "Problem":
        """That of ``vectors (blocks, dim, n)``; masses that are 0 in all of a block count as equal ones."""
        vectors = vectors.float().contiguous()
        if mass is None:
            center = vectors.mean(2, dtype=torch.float64).float()
        else:
            mass = torch.where((mass > 0).any(1, keepdim=True), mass, 1.0).float()
            whole = (vectors * mass.unsqueeze(1)).sum(2, dtype=torch.float64)
            center = (whole / mass.sum(1, keepdim=True, dtype=torch.float64)).float()
        squares = (vectors - center.unsqueeze(2)).square().sum(1)
        total = (squares if mass is None else squares * mass).sum(1, dtype=torch.float64)
        return cls(vectors, mass, center.double(), total)

    def sample(self, limit: int, generator: torch.Generator) -> "Problem":
        """At most so many of the vectors of each block, from the same places in all blocks."""
        count = self.vectors.size(2)
        if count <= limit:
            return self
        places = torch.randperm(count, generator=generator)[:limit].sort().values.to(self.vectors.device)
        mass = None if self.mass is None else self.mass[:, places]
        return Problem.of(self.vectors[:, :, places], mass)

    def lloyd(self, centroids: Tensor, max_iterations: int, tolerance: float) -> "Solutions":
        """Lloyd's iterations from ``centroids (tries, blocks, k, dim)``: see ``reference/kmeans.py``."""
        found = implementation("lloyd")(
            self.vectors, self.mass, centroids, self.center, self.total, max_iterations, tolerance
        )
        centroids, masses, spread = found
        return Solutions(centroids, masses, spread, spread.sum((2, 3)))


class Solutions(NamedTuple):
    """Where Lloyd's iterations ended, in several tries for each block.

    Attributes:
        centroids, masses, spread: see ``reference/kmeans.py``.
        error: sum of squared errors, float64 ``(tries, blocks)``.
    """

    centroids: Tensor
    masses: Tensor
    spread: Tensor
    error: Tensor

    def best(self, count: int) -> "Solutions":
        """The ``count`` tries of each block that leave the least error."""
        tries = self.error.sort(dim=0, stable=True).indices[:count]
        blocks = torch.arange(tries.size(1), device=tries.device)
        return Solutions(*(part[tries, blocks] for part in self))

    def or_better(self, other: "Solutions", better: Tensor) -> "Solutions":
        """Those of ``other`` where ``better (tries, blocks)``."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(better.reshape(*better.shape, *[1] * (mine.dim() - 2)), theirs, mine)

        return Solutions(*map(choose, self, other))


def search(
    problem: Problem, clusters: int, starts: int, rounds: int, generator: torch.Generator
) -> Solutions:
    """The best solution found for each block, from so many starts and by so many rounds of swaps at most."""
    found = problem.lloyd(seeds(problem, clusters, starts, generator), *_ROUGH)
    found = problem.lloyd(found.best(max(1, starts // _KEPT)).centroids, *_FINE).best(1)
    failures = torch.zeros_like(found.error[0], dtype=torch.int64)
    effort = _EFFORT if problem.vectors.size(2) * clusters > SMALL else _EFFORT_IF_SMALL
    # With two clusters, a swap would leave none to merge.
    for _ in range(min(rounds, effort.rounds) if clusters > 2 else 0):
        tried = problem.lloyd(_swapped(found, failures * effort.swaps, effort.swaps), *_SHORT)
        tried = problem.lloyd(tried.best(_PROMISING).centroids, *_FINE).best(1)
        better = tried.error < found.error * (1 - 1e-6)
        found = found.or_better(tried, better)
        failures = torch.where(better[0], 0, failures + 1)
        if (failures >= effort.patience).all():
            break
    return found


def _swapped(found: Solutions, first: Tensor, count: int) -> Tensor:
    """Centroids ``(count, blocks, k, dim)`` after the swaps that promise most, from ``first`` on."""
    centroids, masses, spread = (part[0].double() for part in found[:3])
    blocks, clusters, dim = centroids.shape
    block = torch.arange(blocks, device=first.device)[:, None]

    apart = (centroids[:, :, None] - centroids[:, None]).square().sum(3)
    joint = masses[:, :, None] + masses[:, None]
    cost = torch.where(joint > 0, masses[:, :, None] * masses[:, None] / joint * apart, 0.0)
    low, high = torch.triu_indices(clusters, clusters, 1, device=first.device)
    cost, pair = cost[:, low, high].sort(dim=1, stable=True)
    cost, pair = cost[:, :_CHOICES], pair[:, :_CHOICES]
    kept, freed = low[pair], high[pair]

    # A normal distribution that is split in the middle of an axis loses this share of its variance along it.
    widest, axis = spread.max(2)
    gain, wide = (widest * (2 / math.pi)).sort(dim=1, stable=True, descending=True)
    gain, wide = gain[:, :_CHOICES], wide[:, :_CHOICES]

    score = gain[:, None] - cost[:, :, None]
    clash = (kept[:, :, None] == wide[:, None]) | (freed[:, :, None] == wide[:, None])
    order = score.masked_fill(clash, -torch.inf).flatten(1).sort(dim=1, stable=True, descending=True).indices
    rank = (first[:, None] + torch.arange(count, device=first.device)) % order.size(1)
    swap = order.gather(1, rank)
    merge, split = swap // wide.size(1), swap % wide.size(1)
    kept, freed, wide = kept.gather(1, merge), freed.gather(1, merge), wide.gather(1, split)

    one, other = masses[block, kept, None], masses[block, freed, None]
    share = torch.where(one + other > 0, other / (one + other), 0.0)
    deviation = (widest[block, wide] / masses[block, wide].clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    step = torch.zeros(blocks, count, dim, dtype=torch.float64, device=first.device)
    # Either half has its mean at sqrt(2 / pi) of the deviation.
    step.scatter_(2, axis[block, wide].unsqueeze(2), (deviation * math.sqrt(2 / math.pi)).unsqueeze(2))

    result = centroids[:, None].repeat(1, count, 1, 1)
    place = torch.arange(count, device=first.device)
    middle = centroids[block, wide]
    result[block, place, kept] = torch.lerp(centroids[block, kept], centroids[block, freed], share)
    result[block, place, freed] = middle + step
    result[block, place, wide] = middle - step
    return result.transpose(0, 1).float()


def seeds(
    problem: Problem,
    clusters: int,
    tries: int,
    generator: torch.Generator,
    *,
    candidates: int = _CANDIDATES,
    sampled: bool = True,
) -> Tensor:
    """Centroids to begin with, float32 ``(tries, blocks, clusters, dim)``.

    Args:
        problem: the vectors.
        clusters: how many centroids.
        tries: how many of each.
        generator: of the CPU, so that a seed means the same on every device.
        candidates: how many vectors are drawn for each centroid.
        sampled: look at some vectors of each block; else at all.
    """
    blocks, dim, count = problem.vectors.shape
    device = problem.vectors.device
    looked_at = min(count, _SEEDS_PER_CLUSTER * clusters) if sampled else count
    together = max(1, _SEEDING // max(1, blocks * looked_at * candidates))
    found = []
    for first in range(0, tries, together):
        here = min(tries - first, together)
        draws = torch.rand(clusters, here * blocks, candidates, generator=generator, dtype=torch.float64)
        if looked_at == count:
            chosen = torch.arange(count).expand(here, count)
        else:
            chosen = torch.randint(count, (here, looked_at), generator=generator)
        chosen = chosen.to(device)
        vectors = problem.vectors[:, :, chosen].permute(2, 0, 1, 3).reshape(-1, dim, looked_at)
        mass = vectors.new_ones(vectors.size(0), looked_at)
        if problem.mass is not None:
            mass = problem.mass[:, chosen].transpose(0, 1).reshape(-1, looked_at)
        found.append(_plus_plus(vectors, mass, draws.to(device)).reshape(-1, blocks, clusters, dim))
    return torch.cat(found)


def _plus_plus(vectors: Tensor, mass: Tensor, draws: Tensor) -> Tensor:
    """Vectors ``(blocks, clusters, dim)``, drawn by their mass times squared distance to those before.

    Of several candidates, the one that leaves the least error is taken.

    Args:
        vectors: float32 ``(blocks, dim, n)``.
        mass: float32 ``(blocks, n)``.
        draws: uniform in [0, 1), float64 ``(clusters, blocks, candidates)``.
    """
    dim, count = vectors.shape[1:]
    nearest = torch.full_like(mass, torch.inf)
    chances = mass.double()
    seeds = []
    for draw in draws:
        total = chances.cumsum(1)
        place = torch.searchsorted(total, draw * total[:, -1:], right=True).clamp(max=count - 1)
        picked = vectors.gather(2, place.unsqueeze(1).expand(-1, dim, -1))
        distance = torch.zeros_like(mass).unsqueeze(1)
        for entry in range(dim):
            distance = distance + (vectors[:, entry, None] - picked[:, entry, :, None]).square()
        left = torch.minimum(nearest.unsqueeze(1), distance)
        best = (left * mass.unsqueeze(1)).sum(2, dtype=torch.float64).argmin(1)[:, None, None]
        seeds.append(picked.gather(2, best.expand(-1, dim, 1)))
        nearest = left.gather(1, best.expand(-1, -1, count))[:, 0]
        chances = nearest.double() * mass
    return torch.cat(seeds, 2).transpose(1, 2)
