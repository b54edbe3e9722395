"""Training of the weight through its palettized values."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

import coreai_kernels
from coreai_opt.palettization.spec.training_strategy import TrainingStrategy, TrainingStrategySpec

__all__ = ["StraightThroughTrainingSpec"]


class _StraightThroughStrategy(TrainingStrategy):
    """The forward uses the nearest palette entries, the gradient goes to the weight as if it had not."""

    def __init__(self, refresh_interval: int, refresh_iterations: int) -> None:
        self.refresh_interval = refresh_interval
        self.refresh_iterations = refresh_iterations

    # `module`: a k-means simulator, which knows the strategies; not named here, so that imports go one way.
    def train_forward(self, module: Any, weight: torch.Tensor) -> torch.Tensor:
        points, palettes = module.points(weight), module.palettes()
        indices = module.nearest(points.detach(), palettes.detach(), weight)
        block_size = module.point_blocks(weight).block_size
        values = coreai_kernels.lookup(indices, palettes, block_size=block_size, weight=points)
        return module.restored(values, weight)

    def on_step(self, module: Any, weight: torch.Tensor, step: int) -> None:
        if step % self.refresh_interval == 0:
            module.refine(weight, self.refresh_iterations)


@TrainingStrategySpec.register("straight_through")
class StraightThroughTrainingSpec(TrainingStrategySpec):
    """The weight trains, by the straight-through estimator (Bengio et al., arXiv 1308.3432).

    In each forward every value is replaced by its nearest palette entry, and the gradient passes to the value
    unchanged. ``KMeansPalettizer.step`` lets the palette follow the weight by Lloyd's iterations, which wait
    for no device.

    Fields:
        refresh_interval: steps between two refreshes of the palette.
        refresh_iterations: Lloyd's iterations in each refresh.
    """

    _strategy_cls: ClassVar[type[TrainingStrategy]] = _StraightThroughStrategy

    refresh_interval: Annotated[int, Field(gt=0)] = 1
    refresh_iterations: Annotated[int, Field(gt=0)] = 1
