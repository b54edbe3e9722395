"""Granularities that leave their axis open, or that a shared quantizer cannot keep."""

import logging
from typing import Any

from torch.fx import GraphModule, Node

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.axes import has_open_axis
from coreai_opt.quantization._graph.insert import quantizer_nodes
from coreai_opt.quantization._graph.nodes import overload_name, packet_name, tensor_of
from coreai_opt.quantization.spec import PerBlockGranularity, PerTensorGranularity
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["complete_axes", "make_shared_ones_fit"]

logger = logging.getLogger(__name__)

# Of weights: the axis of channels, and that of blocks.
_OUTPUT_FIRST, _INPUT_FIRST = (0, 1), (1, 0)
_CHANNELS_AND_BLOCKS = {
    "conv1d": _OUTPUT_FIRST,
    "conv2d": _OUTPUT_FIRST,
    "conv3d": _OUTPUT_FIRST,
    "linear": _OUTPUT_FIRST,
    "embedding": _OUTPUT_FIRST,
    "conv_transpose1d": _INPUT_FIRST,
    "conv_transpose2d": _INPUT_FIRST,
    "conv_transpose3d": _INPUT_FIRST,
}


def complete_axes(model: GraphModule) -> None:
    """Give weights' granularities the axis that suits the operation that reads them.

    Raises:
        ValueError: there is no default, or operations that share a weight have different ones; or the
            granularity of an activation has no axis.
    """
    found: dict[FakeQuantizeImplBase, set[int]] = {}
    for node, quantizer in quantizer_nodes(model):
        if not has_open_axis(quantizer.granularity):
            continue
        if quantizer.quantization_target is not CompressionTargetTensor.WEIGHT:
            raise ValueError(
                f"the granularity of the activation {node.args[0]} needs an axis, and there is no default "
                f"for activations. Give one, e.g. PerChannelGranularity(axis=1)."
            )
        is_block = isinstance(quantizer.granularity, PerBlockGranularity)
        for reader in node.users:
            axes = _CHANNELS_AND_BLOCKS.get(packet_name(reader))
            if axes is None and packet_name(reader) in _ELEMENTWISE and _has_one_axis(node):
                # Presets and the like are for weights of layers: they pass over the weights of norms.
                quantizer._disable()
                continue
            if axes is None:
                raise ValueError(
                    f"the granularity of {node.args[0]}, which {reader.name!r} reads, needs an axis, and "
                    f"there is a default for weights of convolutions, linear layers and embeddings only. "
                    f"Give one, e.g. PerChannelGranularity(axis=0)."
                )
            found.setdefault(quantizer, set()).add(axes[is_block])
        if len(found.get(quantizer, ())) > 1:
            raise ValueError(
                f"operations that share the weight {node.args[0]} have different default axes, "
                f"{sorted(found[quantizer])}. Give one, e.g. PerChannelGranularity(axis=0)."
            )
    for quantizer, candidates in found.items():
        granularity = quantizer.granularity
        quantizer.granularity = granularity.model_copy(update={"axis": next(iter(candidates))})


_ELEMENTWISE = frozenset({"add", "mul", "sub"})


def _has_one_axis(node: Node) -> bool:
    tensor = tensor_of(node.all_input_nodes[0])
    return tensor is not None and tensor.dim() == 1


_POOLS = frozenset({f"{kind}_pool{axes}d" for kind in ("max", "avg", "adaptive_avg") for axes in (1, 2, 3)})
_RESHAPING = frozenset({"flatten.using_ints", "mean.dim"})
_RESHAPING_PACKETS = _POOLS | {"reshape", "view", "unsqueeze"}
_MOVING = frozenset({"transpose.int"})
_MOVING_PACKETS = frozenset({"t", "permute"})


def make_shared_ones_fit(model: GraphModule) -> None:
    """Quantize per tensor where one quantizer serves both sides of an operation that changes its axis."""
    modules = dict(quantizer_nodes(model))
    for node in model.graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        quantizer = modules.get(node.args[0])
        if quantizer is None or not any(modules.get(user) is quantizer for user in node.users):
            continue
        granularity = quantizer.granularity
        if isinstance(granularity, PerTensorGranularity) or _keeps_axes(node, granularity):
            continue
        logger.warning(
            f"{granularity!r} does not fit both sides of {node.name!r}, which share a quantizer: it "
            f"quantizes per tensor"
        )
        quantizer.granularity = PerTensorGranularity()


def _keeps_axes(node: Node, granularity: Any) -> bool:
    """Whether the granularity cuts input and output into the same blocks."""
    name, packet = overload_name(node), packet_name(node)
    reshapes = name in _RESHAPING or packet in _RESHAPING_PACKETS
    moves = name in _MOVING or packet in _MOVING_PACKETS
    if not reshapes and not moves:
        return True
    source = node.args[0]
    while source.op == "call_module":  # type: ignore[union-attr]
        source = source.args[0]  # type: ignore[union-attr]
    before, after = tensor_of(source), tensor_of(node)  # type: ignore[arg-type]
    if before is None or after is None or before.dim() != after.dim():
        return False
    rank = before.dim()
    one_axis = granularity.axis is not None and not isinstance(granularity, PerBlockGranularity)
    axes = [granularity.axis % rank] if one_axis else list(range(rank))
    if moves:
        order = _order(node, rank)
        return all(order[axis] == axis for axis in axes)
    return all(before.shape[axis] == after.shape[axis] for axis in axes)


def _order(node: Node, rank: int) -> list[int]:
    """Which axis of the input each axis of the output is."""
    order = list(range(rank))
    if packet_name(node) == "permute":
        return [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
    if packet_name(node) == "transpose":
        first, second = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = second, first
        return order
    return order[::-1]
