"""Training of the palette by soft assignment."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

import coreai_kernels
from coreai_opt._sharding.layout import whole
from coreai_opt.palettization.spec.training_strategy import TrainingStrategy, TrainingStrategySpec

__all__ = ["DKMTrainingSpec"]


class _DKMStrategy(TrainingStrategy):
    """The forward mixes the palette's entries by their nearness; the weight and the palette get gradients."""

    uses_palette_spacing = True

    def __init__(self, temperature: float, iterations: int) -> None:
        self.temperature = temperature
        self.iterations = iterations

    # `module`: a k-means simulator, which knows the strategies; not named here, so that imports go one way.
    def train_forward(self, module: Any, weight: torch.Tensor) -> torch.Tensor:
        palettes, held = module.palettes(), module.held_entries()
        if held is not None:
            palettes = torch.where(held, palettes.detach(), palettes)
        values = coreai_kernels.soft_palettize(
            module.points(weight),
            palettes,
            self.temperature * module.palette_spacing,
            block_size=module.point_blocks(weight).block_size,
            iterations=self.iterations,
        )
        return module.restored(values, weight)

    def on_palette_computed(self, module: Any) -> None:
        centroids = module.centroids
        assert centroids is not None
        if not isinstance(centroids, nn.Parameter):
            del module.centroids
            module.centroids = nn.Parameter(centroids.detach())
        module.palette_spacing = _spacing(whole(centroids.detach()))


def _spacing(centroids: torch.Tensor) -> float:
    """Median squared distance between an entry and the nearest other one; one if all coincide."""
    distances = torch.cdist(centroids.float(), centroids.float()).square()
    distances = distances.masked_fill(distances == 0, torch.inf)
    nearest = distances.amin(-1)
    nearest = nearest[nearest.isfinite()]
    return nearest.median().item() if nearest.numel() else 1.0


@TrainingStrategySpec.register("dkm")
class DKMTrainingSpec(TrainingStrategySpec):
    """The palette trains, with the weight, by differentiable k-means (Cho et al., arXiv 2108.12659).

    In training each value is a mean of the palette's entries, weighted by ``softmax(-distance² / t)``. The
    palette becomes a parameter, so make the optimizer after ``prepare``. Evaluation uses the nearest entry.

    Fields:
        temperature: ``t`` in units of the palette's spacing, the median squared distance between an entry
            and its nearest neighbour when the palette is computed. Smaller is nearer to a hard assignment,
            with less gradient to the entries that are not nearest. A ``state_dict`` holds the spacing as
            ``palette_spacing``, a key of this strategy alone; without it that of the loaded palette is taken.
        iterations: updates of the palette towards the soft means within each forward, as in the paper. In
            these the zeros of a pruned weight count as values, unless palettes are of vectors.
    """

    _strategy_cls: ClassVar[type[TrainingStrategy]] = _DKMStrategy

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    iterations: Annotated[int, Field(ge=0)] = 0
