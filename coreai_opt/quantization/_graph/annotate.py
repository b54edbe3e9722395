"""What the configurations propose for the inputs and outputs of operations, before neighbours agree."""

import logging
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.configs import MISSING, NodeConfig, NodeConfigs, lookup
from coreai_opt.quantization._graph.nodes import is_quantizable, is_state, overload_name, packet_name
from coreai_opt.quantization._graph.patterns import Match, find_matches, in_place_too
from coreai_opt.quantization._graph.slots import INTRINSIC, OUTPUT, Field, Proposal, Slot, Slots
from coreai_opt.quantization.spec import QuantizationScheme

__all__ = ["Annotation", "Annotations", "annotate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """What a node is quantized as.

    Fields:
        match: the operation that it belongs to.
        config: the specifications that hold for it.
        priority: the lower one takes precedence.
    """

    match: Match
    config: NodeConfig
    priority: int

    def inside(self, node: Node) -> bool:
        """Whether the node belongs to the same operation."""
        return node in self.match.nodes


@dataclass
class Annotations:
    """Nodes that are quantized, and what is proposed for their inputs and outputs."""

    nodes: dict[Node, Annotation] = field(default_factory=dict)
    slots: Slots = field(default_factory=Slots)


def annotate(
    graph: Graph,
    configs: NodeConfigs,
    local_names: dict[Node, set[str]],
    more_types: frozenset[str] = frozenset(),
) -> Annotations:
    """Propose quantizers.

    Args:
        graph: exported, with whole aten operators.
        configs: the model's.
        local_names: of the parameters and buffers that nodes read, the attributes that hold them.
        more_types: of operations that are quantized besides the known ones.

    Raises:
        RuntimeError: a specification for an input names a parameter; or a value inside of what is quantized
            as one operation is also read outside.
    """
    annotations = Annotations()
    for priority, (match, config) in enumerate(_by_precedence(graph, configs, more_types)):
        annotation = Annotation(match, config, priority)
        for node in match.nodes:
            annotations.nodes.setdefault(node, annotation)
    for node in graph.nodes:
        own = annotations.nodes.get(node)
        if own is not None:
            if own.match.primary is node:
                _propose_inputs(annotations.slots, node, own, local_names)
            _propose_output(annotations.slots, node, own)
    return annotations


def _by_precedence(
    graph: Graph, configs: NodeConfigs, more_types: frozenset[str]
) -> list[tuple[Match, NodeConfig]]:
    found = []
    for match in find_matches(graph, more_types):
        config = configs.of(match.primary)
        if config is not None:
            found.append((match, config))
    # Stable: the order of the graph comes last.
    return sorted(
        found,
        key=lambda each: (
            each[1].level.value,
            each[1].kind,
            -len(each[0].nodes),
            each[1].position,
        ),
    )


def _propose_inputs(
    slots: Slots, node: Node, annotation: Annotation, local_names: dict[Node, set[str]]
) -> None:
    specs = annotation.config.specs
    for index, producer in enumerate(node.all_input_nodes):
        if annotation.inside(producer):
            continue
        named = index in (specs.op_input_spec or {})
        names = local_names.get(producer, set())
        if not is_quantizable(producer):
            if named or any(name in (specs.op_state_spec or {}) for name in names):
                logger.warning(
                    f"{producer.name!r}, input {index} of {node.name!r}, is named in the configuration, but "
                    f"is no floating-point tensor of several elements: it is not quantized"
                )
            continue
        if is_state(producer):
            if named:
                raise RuntimeError(
                    f"op_input_spec names input {index} of {node.name!r}, which is the parameter or buffer "
                    f"{producer.target!r}: use op_state_spec for it"
                )
            spec = None if producer.op != "get_attr" else _state_spec(specs.op_state_spec, names)
            target = CompressionTargetTensor.WEIGHT
        else:
            spec = lookup(specs.op_input_spec, index)
            target = CompressionTargetTensor.ACTIVATION
        _propose(slots, Slot(node, index), spec, target, annotation.priority)


def _state_spec(specs: Any, names: set[str]) -> Any:
    known = [key for key in specs or {} if key in names]
    return specs[known[-1]] if known else lookup(specs, "*")


def _propose(slots: Slots, slot: Slot, spec: Any, target: CompressionTargetTensor, priority: int) -> None:
    if spec is MISSING:
        return
    proposal = Proposal(declined=priority) if spec is None else Proposal.of(spec, target, priority)
    slots.put(slot, proposal)


def _propose_output(slots: Slots, node: Node, annotation: Annotation) -> None:
    if not node.users:
        return
    specs = annotation.config.specs.op_output_spec
    if not is_quantizable(node):
        if 0 in (specs or {}):
            logger.warning(
                f"op_output_spec names the output of {node.name!r}, which is no floating-point tensor of "
                f"several elements: it is not quantized"
            )
        return
    inside = [annotation.inside(user) for user in node.users]
    if all(inside):
        return
    if any(inside):
        raise RuntimeError(
            f"the output of {node.name!r} is read inside and outside of the operation "
            f"{[each.name for each in annotation.match.nodes]}, which is quantized as one"
        )
    slot = Slot(node, OUTPUT)
    _propose(slots, slot, lookup(specs, 0), CompressionTargetTensor.ACTIVATION, annotation.priority)
    proposal = slots.get(slot)
    if proposal is not None and proposal.fields:
        proposal.fields.update(_intrinsics(node, proposal))


_RANGES: dict[str, tuple[QuantizationScheme, list[float | None]]] = {}
_INTRINSIC_RANGES: tuple[tuple[frozenset[str], QuantizationScheme, list[float | None]], ...] = (
    (in_place_too("tanh"), QuantizationScheme.SYMMETRIC, [-1.0, 1.0]),
    (in_place_too("sigmoid", "hardsigmoid"), QuantizationScheme.ASYMMETRIC, [0.0, 1.0]),
    (frozenset({"softmax.int", "_softmax"}), QuantizationScheme.ASYMMETRIC, [0.0, 1.0]),
    (in_place_too("relu"), QuantizationScheme.ASYMMETRIC, [0.0, None]),
    (in_place_too("relu6"), QuantizationScheme.ASYMMETRIC, [0.0, 6.0]),
)
for _names, _scheme, _range in _INTRINSIC_RANGES:
    _RANGES.update(dict.fromkeys(_names, (_scheme, _range)))


def _intrinsics(node: Node, proposal: Proposal) -> dict[str, Field]:
    """The scheme and the range that follow from what the operation computes."""
    found = _RANGES.get(packet_name(node)) or _RANGES.get(overload_name(node))
    if found is None and packet_name(node) in in_place_too("hardtanh") and len(node.args) >= 3:
        low, high = (float(end) for end in node.args[1:3])  # type: ignore[arg-type]
        symmetric = low == -high
        found = (
            QuantizationScheme.SYMMETRIC if symmetric else QuantizationScheme.ASYMMETRIC,
            [low, high],
        )
    if found is None:
        return {}
    scheme, limits = found
    fields = {"float_range": Field(list(limits), INTRINSIC)}
    if not is_floating(proposal):
        fields["qscheme"] = Field(scheme, INTRINSIC)
    return fields


def is_floating(proposal: Proposal) -> bool:
    """Whether values are floating point or have power-of-two scales, which must be symmetric."""
    dtype, scale_dtype = proposal.fields["dtype"].value, proposal.fields["scale_dtype"].value
    return dtype.is_floating_point or scale_dtype is not None
