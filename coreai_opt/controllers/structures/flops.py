"""Floating-point operations and parameters of a model whose channels are pruned."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coreai_opt.base_model_compressor import training_flags
from coreai_opt.controllers.structures.channels import Channels, Span
from coreai_opt.controllers.structures.shrink import total

__all__ = ["CostModel"]


class CostModel:
    """Costs as functions of the channels that clusters keep: those that torch's counters find.

    Args:
        model: the uncompressed model.
        channels: of the model.
        args: positional arguments of an example forward.
        kwargs: its keyword arguments.
    """

    def __init__(
        self, model: nn.Module, channels: Channels, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._sizes = [cluster.size for cluster in channels.clusters]
        self._runs = channels.runs
        self._parameters = _varying_parameters(model, channels)
        self._other_flops = self._other_parameters = 0
        with (
            torch.no_grad(),
            training_flags(model, False),
            FlopCounterMode(display=False) as counter,
        ):
            model(*args, **kwargs)
        flops, parameters = self.costs(self._sizes)
        self._other_flops = counter.get_total_flops() - flops
        self._other_parameters = sum(each.numel() for each in model.parameters()) - parameters

    def costs(self, kept: Sequence[int]) -> tuple[int, int]:
        """FLOPs of the example forward, and parameters, with so many units left in each cluster."""

        def count(spans: Sequence[Span]) -> int:
            return total(spans, kept, self._sizes)

        flops = sum(run.coefficient * count(run.outputs) * count(run.inputs) for run in self._runs)
        parameters = sum(each * count(outputs) * count(inputs) for each, outputs, inputs in self._parameters)
        return flops + self._other_flops, parameters + self._other_parameters


_ONE = (Span(None, 1),)


def _varying_parameters(
    model: nn.Module, channels: Channels
) -> list[tuple[int, tuple[Span, ...], tuple[Span, ...]]]:
    """Tensors that shrink: elements for each pair of an output and an input entry; and these."""
    found: list[tuple[int, tuple[Span, ...], tuple[Span, ...]]] = []
    seen: set[int] = set()

    def note(tensor: Any, outputs: tuple[Span, ...], inputs: tuple[Span, ...]) -> None:
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            pairs = sum(span.entries for span in outputs) * sum(span.entries for span in inputs)
            found.append((tensor.numel() // pairs, outputs, inputs))

    for name, outputs in channels.producers.items():
        layer: Any = model.get_submodule(name)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        note(layer.weight, outputs, channels.consumers.get(name, (Span(None, width),)))
        note(layer.bias, outputs, _ONE)
    for name, spans in channels.followers.items():
        layer = model.get_submodule(name)
        for tensor in layer.parameters(recurse=False):
            note(tensor, spans, _ONE)
    return found
