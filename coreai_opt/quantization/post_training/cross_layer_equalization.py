"""Cross-layer equalization: neighbouring weights share their ranges, channel by channel."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from coreai_opt.quantization.post_training._pairs import Pair, find_pairs
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task
from coreai_opt.quantization.post_training.smoothquant import per_input

__all__ = ["CrossLayerEqualization", "equalizing_factors"]


@PostTrainingAlgorithm.register("cross_layer_equalization")
class CrossLayerEqualization(PostTrainingAlgorithm):
    """Equal ranges in the channels between two layers (Nagel et al., arXiv 1906.04721, equation 11).

    Of two layers with nothing but homogeneous functions (relu, pooling) between them, output channel ``i`` of
    the first is divided by ``s_i = sqrt(r1_i / r2_i)``, and the second's input is multiplied; ``r1`` and
    ``r2`` are the largest magnitudes of the channel's weights in each. Batch norms between them have to be
    folded before. The float model computes the same. Calibration data is used to see one forward.

    Fields:
        iterations: rounds over all pairs, at most.
        tolerance: no more rounds once no factor is farther from 1.
    """

    iterations: Annotated[int, Field(ge=1)] = 20
    tolerance: Annotated[float, Field(ge=0)] = 1e-3

    def run(self, task: Task) -> None:
        """See the base."""
        pairs = [
            pair
            for pair in find_pairs(task.model, task.layers, task.batches[0])
            if pair.giver is not None and pair.is_direct and len(pair.layers) == 1
        ]
        treated = {layer for pair in pairs for layer in (pair.giver, *pair.layers)}
        for layer in task.layers:
            if layer not in treated:
                task.left_out[layer.name] = "it has no neighbour to share its range with"
        for _ in tqdm(range(self.iterations), desc="Cross-layer equalization"):
            farthest = 0.0
            for pair in pairs:
                factors = self._factors(pair)
                pair.rescale(factors)
                farthest = max(farthest, float((factors - 1).abs().max()))
            if farthest <= self.tolerance:
                break
        for layer in task.layers:
            layer.observe()

    @staticmethod
    def _factors(pair: Pair) -> Tensor:
        assert pair.giver is not None
        first = pair.giver.weight.detach().float().abs().flatten(1).amax(1)
        second = per_input(pair.layers[0], pair.layers[0].weight.detach().float().abs())
        return equalizing_factors(first, second)


def equalizing_factors(first: Tensor, second: Tensor) -> Tensor:
    """Equation 11 of arXiv 1906.04721: ``s = sqrt(r1 r2) / r2``; 1 for channels without a range."""
    factors = (first * second).sqrt() / second
    usable = factors.isfinite() & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors))
