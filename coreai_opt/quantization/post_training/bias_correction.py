"""Bias correction: the mean error of a layer's outputs is taken from its bias."""

from torch import Tensor

from coreai_opt.quantization.post_training._accumulators import Mean
from coreai_opt.quantization.post_training._layers import Layer
from coreai_opt.quantization.post_training.algorithm import PostTrainingAlgorithm, Task

__all__ = ["BiasCorrection", "mean_error"]


@PostTrainingAlgorithm.register("bias_correction")
class BiasCorrection(PostTrainingAlgorithm):
    """Takes ``E[Q(W) x] - E[W x]`` from the biases (Nagel et al., arXiv 1906.04721, section 4.2).

    ``W`` is the weight as it is now, and the mean is over the inputs that the float model gives. Run after
    another algorithm that chooses rounding, it would see that algorithm's weights: run it before, or alone.
    Layers without a bias stay as they are.
    """

    def run(self, task: Task) -> None:
        """See the base."""
        layers = [layer for layer in task.layers if layer.bias is not None]
        for layer in task.layers:
            if layer.bias is None:
                task.left_out[layer.name] = "the layer has no bias"
        for layer, mean in task.measure("Bias correction", layers, Mean).items():
            assert layer.bias is not None
            layer.bias.sub_(mean_error(layer, mean.value()).to(layer.bias.dtype))


def mean_error(layer: Layer, means: Tensor) -> Tensor:
    """``(Q(W) - W) E[x]``, one value for each output channel, in float64.

    Args:
        layer: the layer.
        means: of each column of its input, ``[groups, columns]``.
    """
    error = (layer.quantized().double() - layer.weight.detach().double()).reshape(
        layer.groups, -1, means.shape[1]
    )
    return (error @ means.double().unsqueeze(2)).reshape(-1)
