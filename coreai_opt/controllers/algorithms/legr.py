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
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from coreai_opt._utils.writing import write_text
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
        state_path: a file that keeps the search, which goes on from there when it was ended.
    """

    generations: int = Field(default=400, ge=1)
    train_steps: int = Field(default=200, ge=0)
    max_pruning: float = Field(default=0.5, gt=0, le=1)
    random_seed: int = 42
    population_size: int = Field(default=64, ge=1)
    num_samples: int = Field(default=16, ge=1)
    mutate_percent: float = Field(default=0.1, gt=0, le=1)
    scale_sigma: float = Field(default=1.0, gt=0)
    state_path: str | None = None


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
        self.best: _Candidate | None = None
        self.history: list[float] = []

    def run(self, judge: Callable[[Coefficients], float]) -> Coefficients:
        """The coefficients of least loss.

        Args:
            judge: the loss of a model that is pruned with the coefficients. One that is not finite loses.
                What it draws at random is a function of the generation.

        Raises:
            ValueError: the file of ``state_path`` belongs to another search, or is none.
        """
        path = None if self.params.state_path is None else Path(self.params.state_path)
        if path is not None and path.exists():
            self._load(path)
        bar = tqdm(
            total=self.params.generations, initial=self.generation, desc="Ranking filters", disable=None
        )
        with bar:
            while self.generation < self.params.generations:
                coefficients = self._next()
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.params.random_seed + self.generation)
                    loss = judge(coefficients)
                candidate = _Candidate(coefficients, loss if math.isfinite(loss) else math.inf)
                self.population.append(candidate)
                if len(self.population) > self.params.population_size:
                    self.population.pop(0)
                if self.best is None or candidate.loss < self.best.loss:
                    self.best = candidate
                self.history.append(self.best.loss)
                bar.update()
                if path is not None:
                    self._save(path)
        assert self.best is not None  # there is a generation
        return self.best.coefficients

    @property
    def generation(self) -> int:
        """How many candidates were judged."""
        return len(self.history)

    def _identity(self) -> dict[str, Any]:
        """What a search depends on, but for the data."""
        return {"spreads": self._spreads, **self.params.model_dump(exclude={"state_path"})}

    def _save(self, path: Path) -> None:
        """Write the search, whole or not at all."""
        assert self.best is not None
        state = {
            "search": self._identity(),
            "generator": self._generator.get_state().tolist(),
            "population": [[each.coefficients, each.loss] for each in self.population],
            "best": [self.best.coefficients, self.best.loss],
            "history": self.history,
        }
        write_text(path, json.dumps(state))

    def _load(self, path: Path) -> None:
        try:
            state = json.loads(path.read_text())
            identity = state["search"]
            best = _candidate(state["best"])
            population = [_candidate(each) for each in state["population"]]
            generator = torch.tensor(state["generator"], dtype=torch.uint8)
            history = [float(each) for each in state["history"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"legr_params.state_path {path} holds no state of a search: {error!r}"
            ) from error
        if identity != self._identity():
            raise ValueError(
                f"legr_params.state_path {path} belongs to a search of other filters or parameters: "
                f"remove it, or name another file"
            )
        self._generator.set_state(generator)
        self.best, self.population, self.history = best, population, history

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


def _candidate(saved: Any) -> _Candidate:
    coefficients, loss = saved
    return _Candidate([(float(a), float(b)) for a, b in coefficients], float(loss))


def save_coefficients(path: str | Path, coefficients: dict[str, tuple[float, float]]) -> None:
    """Write coefficients, by the name of a cluster's first layer, as JSON."""
    write_text(path, json.dumps({name: list(pair) for name, pair in coefficients.items()}, indent=1))


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
