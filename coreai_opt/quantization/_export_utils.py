"""Handlers by which other packages finalize activations of granularities that they add."""

from collections.abc import Callable
from typing import Any

from torch import nn

from coreai_opt.quantization.spec.granularity import QuantizationGranularity

__all__ = [
    "eager_activation_export_handler",
    "graph_activation_export_handler",
    "has_activation_export_handler",
    "register_eager_activation_export_handler",
    "register_graph_activation_export_handler",
]

EagerHandler = Callable[[Any], nn.Module]
GraphHandler = Callable[[Any, Any, Any], None]

_eager: dict[type[QuantizationGranularity], EagerHandler] = {}
_graph: dict[type[QuantizationGranularity], GraphHandler] = {}


def register_eager_activation_export_handler(
    granularity_cls: type[QuantizationGranularity], handler: EagerHandler
) -> None:
    """Finalize activations of exactly this granularity, for Core AI in eager mode, by ``handler``.

    Args:
        granularity_cls: the class; subclasses of it are others.
        handler: gets the simulator, and returns the module that replaces it.
    """
    _eager[granularity_cls] = handler


def register_graph_activation_export_handler(
    granularity_cls: type[QuantizationGranularity], handler: GraphHandler
) -> None:
    """Finalize activations of exactly this granularity, for Core AI in graph mode, by ``handler``.

    Args:
        granularity_cls: the class; subclasses of it are others.
        handler: gets the graph module, the simulator's node and the simulator, and replaces the node.
    """
    _graph[granularity_cls] = handler


def eager_activation_export_handler(simulator: Any) -> EagerHandler | None:
    """The handler for a simulator's granularity in eager mode; None if there is none."""
    return _eager.get(type(simulator.granularity))


def graph_activation_export_handler(simulator: Any) -> GraphHandler | None:
    """The handler for a simulator's granularity in graph mode; None if there is none."""
    return _graph.get(type(simulator.granularity))


def has_activation_export_handler(simulator: Any) -> bool:
    """Whether either mode has a handler for a simulator's granularity."""
    return type(simulator.granularity) in _eager or type(simulator.granularity) in _graph
