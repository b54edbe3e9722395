"""Bias correction: the mean error of a layer's outputs is taken from its bias."""

from torch import Tensor

from coreai_kernels.wide import widened
from coreai_opt.quantization.post_training._accumulators import Mean
from coreai_opt.quantization.post_training._layers import Layer
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task

__all__ = ["BiasCorrection", "mean_error"]


@PostTrainingAlgorithm.register("bias_correction")
class BiasCorrection(PostTrainingAlgorithm):
    """Takes ``E[Q(W) x'] - E[W x]`` from the biases (Nagel et al., arXiv 1906.04721, appendix D).

    ``x`` is what the float model gives a layer to read, and ``x'`` what the quantized layers before it give,
    with their biases corrected. ``W`` is the weight as it is now: another algorithm that chooses rounding
    has to run afterwards. Layers without a bias stay as they are, and are quantized for those behind them.
    """

    def run(self, task: Task) -> None:
        """See the base."""
        means = {layer: each.value() for layer, each in task.measure("Means", task.layers, Mean).items()}
        stages = task.stages("Bias correction", list(means), Mean, granularity="layer", freeze=False)
        for stage in stages:
            found = stage.statistic.value()
            for layer in stage.layers:
                if layer.bias is None:
                    task.left_out[layer.name] = "the layer has no bias"
                else:
                    layer.bias.sub_(mean_error(layer, means[layer], found).to(layer.bias.dtype))


def mean_error(layer: Layer, exact: Tensor, found: Tensor) -> Tensor:
    """``Q(W) E[x'] - W E[x]``, one value for each output channel, in float64 where the device has that.

    Args:
        layer: the layer.
        exact: means of each column of its input in the float model, ``[groups, columns]``.
        found: the same in the quantized one.
    """
    shape = (layer.groups, -1, exact.shape[1])
    simulated, weight = (
        widened(layer.outputs_first(each)).reshape(shape)
        for each in (layer.quantized(), layer.weight.detach())
    )
    meant = weight @ widened(exact).unsqueeze(2)
    return (simulated @ widened(found).unsqueeze(2) - meant).reshape(-1)
