"""AWQ: factors that protect the weights of large activations, found by search."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from coreai_opt.quantization.post_training._accumulators import Accumulator, Gram, Mean
from coreai_opt.quantization.post_training._layers import Columns, Layer
from coreai_opt.quantization.post_training._pairs import Pair, by_input, find_pairs
from coreai_opt.quantization.post_training._stages import Granularity
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task
from coreai_opt.quantization.post_training.smoothquant import channels_of

__all__ = ["AWQ"]


class _Magnitudes(Accumulator):
    """Products of columns, and the mean magnitude of each."""

    def __init__(self) -> None:
        self.gram, self.mean = Gram(), Mean()

    def _add(self, columns: Tensor) -> None:
        self.gram.add(columns)
        self.mean.add(columns.abs())

    def is_finite(self) -> bool:
        return self.mean.is_finite()


@PostTrainingAlgorithm.register("awq")
class AWQ(PostTrainingAlgorithm):
    """Activation-aware scaling of weights (Lin et al., arXiv 2306.00978, equations 4 and 5).

    Where all that reads a tensor is quantized layers, the layers' weights are multiplied by
    ``s = mean|X|^alpha`` channel by channel, and what gives the tensor is divided. ``alpha`` is searched: it
    minimises ``||Q(W diag(s)) diag(s)^-1 X - W X||^2`` of these layers together, over all calibration data.
    The float model computes the same.

    Fields:
        steps: how many values of ``alpha`` from 0 to 1 are tried, 0 among them.
        sequential: see :class:`GPTQ`.
    """

    steps: Annotated[int, Field(ge=1)] = 20
    sequential: Granularity = "block"

    def run(self, task: Task) -> None:
        """See the base."""
        pairs = find_pairs(task.model, task.layers, task.batches[0])
        # A grouped convolution's factors would each serve a channel of its own.
        pairs = [pair for pair in pairs if all(layer.groups == 1 for layer in pair.layers)]
        by_layer = {layer: pair for pair in pairs for layer in pair.layers}
        for layer in task.layers:
            if layer not in by_layer:
                task.left_out[layer.name] = "something else reads its input, or no weight gives it"
        chosen: dict[Pair, Tensor] = {}
        for stage in task.stages(
            "AWQ", [*by_layer], _Magnitudes, granularity=self.sequential, simulate=False, keep=False
        ):
            pair = by_layer[stage.layers[0]]
            if pair not in chosen:
                chosen[pair] = self._search(pair, stage.statistic)
        for pair, factors in chosen.items():
            pair.rescale(factors)
        for layer in task.layers:
            layer.observe()

    def _search(self, pair: Pair, statistic: _Magnitudes) -> Tensor:
        products = statistic.gram.matrices()[0]
        magnitudes = channels_of(pair.layers[0], statistic.mean.value().float())
        best, least = torch.ones_like(magnitudes), float("inf")
        for step in range(self.steps):
            factors = magnitudes.clamp(min=1e-4).pow(step / self.steps)
            factors = factors / (factors.max() * factors.min()).sqrt()
            loss = sum(_loss(layer, factors, products) for layer in pair.layers)
            if loss < least:
                best, least = factors, loss
        return best


def _loss(layer: Layer, factors: Tensor, products: Tensor) -> float:
    """``||Q(W diag(s)) diag(s)^-1 X - W X||^2`` a position, by the products ``X X^T`` of the inputs."""
    weight = layer.weight.detach().float()
    scaled = by_input(layer, factors)
    columns = Columns(layer)
    error = columns.rounded(weight * scaled) / scaled - weight
    error = layer.outputs_first(error).reshape(columns.rows, columns.columns)
    return float(((error @ products) * error).sum())
