"""Floating-point operations and parameters of a model whose channels are pruned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.controllers.core.layers import WEIGHTED
from coreai_opt.controllers.structures.channels import Cluster, Consumer

__all__ = ["CostModel"]


@dataclass(frozen=True)
class _Layer:
    """Costs of a layer at full size; clusters of its output and of the parts of its input."""

    flops: int
    weights: int
    biases: int
    output: int | None
    inputs: tuple[tuple[int | None, float], ...]
    depthwise: bool


class CostModel:
    """Costs of convolutions and linear layers as functions of the channels that clusters keep.

    Args:
        model: the uncompressed model.
        clusters: of its channels.
        consumers: of its channels.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        clusters: Sequence[Cluster],
        consumers: Sequence[Consumer],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._sizes = [cluster.size for cluster in clusters]
        output = {name: number for number, cluster in enumerate(clusters) for name in cluster.producers}
        around = {name: number for number, cluster in enumerate(clusters) for name in cluster.followers}
        inputs = {consumer.name: _shares(consumer) for consumer in consumers}
        counted = _multiplications(model, args, kwargs)
        self._layers = []
        others = sum(parameter.numel() for parameter in model.parameters())
        for name, multiplications in counted.items():
            layer: Any = model.get_submodule(name)
            biases = 0 if layer.bias is None else layer.bias.numel()
            depthwise = name in around
            self._layers.append(
                _Layer(
                    flops=2 * multiplications,
                    weights=layer.weight.numel(),
                    biases=biases,
                    output=around.get(name, output.get(name)),
                    inputs=() if depthwise else inputs.get(name, ()),
                    depthwise=depthwise,
                )
            )
            others -= layer.weight.numel() + biases
        for name, number in around.items():
            layer = model.get_submodule(name)
            if name not in counted:
                size = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
                self._layers.append(_Layer(0, 0, size, number, (), True))
                others -= size
        self._others = others

    def costs(self, kept: Sequence[int]) -> tuple[int, int]:
        """FLOPs of one sample batch and parameters, with so many channels left in each cluster."""
        shares = [count / size for count, size in zip(kept, self._sizes, strict=True)]
        flops, parameters = 0.0, float(self._others)
        for layer in self._layers:
            out = 1.0 if layer.output is None else shares[layer.output]
            into = (
                sum(part * (1.0 if c is None else shares[c]) for c, part in layer.inputs)
                if layer.inputs
                else 1.0
            )
            flops += layer.flops * out * into
            parameters += layer.weights * out * into + layer.biases * out
        return round(flops), round(parameters)


def _shares(consumer: Consumer) -> tuple[tuple[int | None, float], ...]:
    total = sum(size * repeat for _, size, repeat in consumer.segments)
    return tuple((cluster, size * repeat / total) for cluster, size, repeat in consumer.segments)


@torch.no_grad()
def _multiplications(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Multiplications of each convolution and linear layer in one forward."""
    counted: dict[str, int] = {}

    def count(name: str, layer: Any, output: Tensor) -> None:
        inputs = layer.weight[0].numel()
        if isinstance(layer, nn.Linear):
            each = layer.in_features
        elif layer.transposed:
            each = layer.weight.numel() // layer.out_channels
        else:
            each = inputs
        counted[name] = counted.get(name, 0) + output.numel() * each

    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: count(name, layer, output))
        for name, layer in model.named_modules()
        if isinstance(layer, WEIGHTED)
    ]
    try:
        with training_flags(model, False):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counted
