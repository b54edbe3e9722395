"""SmoothQuant: factors move outliers of activations into weights."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coreai_opt.quantization.post_training._accumulators import Largest
from coreai_opt.quantization.post_training._layers import Layer
from coreai_opt.quantization.post_training._pairs import Pair, find_pairs, input_axis
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task

__all__ = ["SmoothQuant", "channels_of", "per_input", "smoothing_factors"]


@PostTrainingAlgorithm.register("smoothquant")
class SmoothQuant(PostTrainingAlgorithm):
    """Easier activations for harder weights (Xiao et al., arXiv 2211.10438, equation 4).

    Where all that reads a tensor is quantized layers, its channel ``j`` is divided by
    ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``, in the weights of what gives it, and the layers' weights
    are multiplied. The float model computes the same.

    Fields:
        alpha: how much of the difficulty moves, 0 to 1.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    def run(self, task: Task) -> None:
        """See the base."""
        pairs = find_pairs(task.model, task.layers, task.batches[0])
        by_first = {pair.layers[0]: pair for pair in pairs}
        covered = {layer for pair in pairs for layer in pair.layers}
        for layer in task.layers:
            if layer not in covered:
                task.left_out[layer.name] = "something else reads its input, or no weight gives it"
        # All layers at once: a statistic is one number a channel.
        found = task.measure("SmoothQuant", [*by_first], Largest)
        factors = {
            pair: self._factors(pair, found[layer].value())
            for layer, pair in by_first.items()
            if layer in found
        }
        for pair, each in factors.items():
            pair.rescale(each)
        for layer in task.layers:
            layer.observe()

    def _factors(self, pair: Pair, largest: Tensor) -> Tensor:
        weights = torch.stack(
            [per_input(layer, layer.weight.detach().float().abs()) for layer in pair.layers]
        )
        return smoothing_factors(channels_of(pair.layers[0], largest), weights.amax(0), self.alpha)


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Equation 4 of arXiv 2211.10438: one factor for each channel; 1 for channels that are always zero.

    Args:
        inputs: largest magnitudes of the channels of the activation.
        weights: the same of the weights that read it.
        alpha: see :class:`SmoothQuant`.
    """
    factors = inputs.pow(alpha) / weights.pow(1 - alpha)
    usable = factors.isfinite() & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors))


def per_input(layer: Layer, magnitudes: Tensor) -> Tensor:
    """The largest of a weight's magnitudes for each input channel."""
    others = [axis for axis in range(magnitudes.dim()) if axis != input_axis(layer)]
    return magnitudes.amax(others)


def channels_of(layer: Layer, largest: Tensor) -> Tensor:
    """The largest of columns' values for each input channel."""
    kernel = math.prod(layer.weight.shape[2:])
    return largest.reshape(-1, kernel).amax(1)
