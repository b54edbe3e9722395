"""Learned global ranking of filters, LeGR (Chin et al., arXiv 1904.12368).

Importances of filters of different layers do not compare. LeGR learns a factor and an offset for each
cluster, so that ``factor * importance + offset`` does: regularized evolution over these pairs, which are
judged by the loss that remains when the model is pruned with it to the highest level and trained for a few
steps.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from coreai_opt.controllers.core.config import ConfigModel

__all__ = ["Evolution", "LegrParams", "load_coefficients", "save_coefficients"]

Coefficients = list[tuple[float, float]]
"""Factor and offset of each cluster."""


class LegrParams(ConfigModel):
    """Parameters of the search.

    Fields:
        generations: candidates that are tried.
        train_steps: optimizer steps for each, before it is judged.
        max_pruning: level to which the model is pruned to judge a candidate.
        random_seed: of the search.
        population_size: candidates that live at a time.
        num_samples: of them that compete to have the next offspring.
        mutate_percent: share of the clusters that differ in an offspring.
        scale_sigma: spread of the first mutations, which shrinks over the generations.
    """

    generations: int = Field(default=400, ge=1)
    train_steps: int = Field(default=200, ge=0)
    max_pruning: float = Field(default=0.5, gt=0, le=1)
    random_seed: int = 42
    population_size: int = Field(default=64, ge=1)
    num_samples: int = Field(default=16, ge=1)
    mutate_percent: float = Field(default=0.1, gt=0, le=1)
    scale_sigma: float = Field(default=1.0, gt=0)


@dataclass
class _Candidate:
    coefficients: Coefficients
    loss: float


class Evolution:
    """Regularized evolution: the best of a sample has an offspring, which takes the oldest one's place.

    Args:
        clusters: importances of the filters of each cluster.
        params: of the search.
    """

    def __init__(self, clusters: Sequence[Tensor], params: LegrParams) -> None:
        self.params = params
        self._spreads = [float(each.std(correction=0)) for each in clusters]
        self._generator = torch.Generator().manual_seed(params.random_seed)
        self.population: list[_Candidate] = []
        self.history: list[float] = []
        self.generation = 0

    def run(self, judge: Callable[[Coefficients], float]) -> Coefficients:
        """The coefficients of least loss.

        Args:
            judge: the loss of a model that is pruned with the coefficients. One that is not finite loses.
        """
        best: _Candidate | None = None
        while self.generation < self.params.generations:
            coefficients = self._next()
            loss = judge(coefficients)
            candidate = _Candidate(coefficients, loss if math.isfinite(loss) else math.inf)
            self.population.append(candidate)
            if len(self.population) > self.params.population_size:
                self.population.pop(0)
            if best is None or candidate.loss < best.loss:
                best = candidate
            self.history.append(best.loss)
            self.generation += 1
        assert best is not None  # there is a generation
        return best.coefficients

    def _uniform(self, count: int) -> list[int]:
        order = torch.randperm(len(self.population), generator=self._generator)
        return [int(index) for index in order[:count]]

    def _next(self) -> Coefficients:
        """The first candidate changes nothing; the first population is random; then come offspring."""
        neutral = [(1.0, 0.0) for _ in self._spreads]
        if self.generation == 0:
            return neutral
        if self.generation < self.params.population_size:
            return [
                self._mutated(pair, spread, 1.0) for pair, spread in zip(neutral, self._spreads, strict=True)
            ]
        sample = [self.population[index] for index in self._uniform(self.params.num_samples)]
        parent = min(sample, key=lambda each: each.loss)
        share = 1 - self.generation / self.params.generations
        chosen = torch.rand(len(self._spreads), generator=self._generator) < self.params.mutate_percent
        chosen[int(torch.randint(len(self._spreads), (), generator=self._generator))] = True
        return [
            self._mutated(pair, spread, share) if mutate else pair
            for pair, spread, mutate in zip(parent.coefficients, self._spreads, chosen.tolist(), strict=True)
        ]

    def _mutated(self, pair: tuple[float, float], spread: float, share: float) -> tuple[float, float]:
        a, b = torch.randn(2, generator=self._generator).tolist()
        sigma = self.params.scale_sigma * share
        return pair[0] * math.exp(sigma * a), pair[1] + sigma * spread * b


def save_coefficients(path: str | Path, coefficients: dict[str, tuple[float, float]]) -> None:
    """Write coefficients, by the name of a cluster's first layer, as JSON."""
    Path(path).write_text(json.dumps({name: list(pair) for name, pair in coefficients.items()}, indent=1))


def load_coefficients(path: str | Path, names: Sequence[str]) -> Coefficients:
    """Read what :func:`save_coefficients` wrote.

    Raises:
        ValueError: the file is for other clusters.
    """
    found = json.loads(Path(path).read_text())
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"load_ranking_coeffs_path: {path} has no coefficients of {missing}")
    return [(float(found[name][0]), float(found[name][1])) for name in names]
