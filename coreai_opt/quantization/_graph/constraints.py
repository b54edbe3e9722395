"""Which inputs and outputs must be quantized alike, given what is proposed for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from torch.fx import Node

from coreai_opt.quantization._graph.annotate import Annotations
from coreai_opt.quantization._graph.nodes import is_state, packet_name, tensor_of
from coreai_opt.quantization._graph.slots import OUTPUT, Slot

__all__ = ["Constraint", "Rule", "constraints_at"]

_KEEPS_RANK = frozenset({"clone", "dropout", "feature_dropout", "permute", "slice", "t", "transpose"})
_CHANGES_RANK = frozenset({"expand", "reshape", "select", "squeeze", "unsqueeze", "view"})
_SHAPE_OPERATIONS = _KEEPS_RANK | _CHANGES_RANK


class Rule(Enum):
    """What a constraint asks for.

    TIE: one quantizer for all slots; none if all that have an opinion decline.
    TIE_STATE: one quantizer for all slots; none if who declines takes precedence.
    SAME_DTYPE: quantizers of one dtype.
    COPY: scheme and range of the first slot for the others.
    """

    TIE = auto()
    TIE_STATE = auto()
    SAME_DTYPE = auto()
    COPY = auto()


@dataclass(frozen=True)
class Constraint:
    """A rule for some slots."""

    rule: Rule
    slots: tuple[Slot, ...]


def constraints_at(node: Node, annotations: Annotations) -> Iterator[Constraint]:
    """The constraints that hold at a node and its edges, as things are proposed now."""
    yield from _edges(node, annotations)
    yield from _shared_operation(node, annotations)
    yield from _shared_state(node, annotations)
    if packet_name(node) in _KEEPS_RANK:
        yield _kept_rank(node, annotations)
    elif packet_name(node) in _CHANGES_RANK:
        yield from _changed_rank(node, annotations)


def input_slot(node: Node, producer: Node) -> Slot:
    """The slot of ``node`` that ``producer`` feeds."""
    return Slot(node, node.all_input_nodes.index(producer))


def _edges(node: Node, annotations: Annotations) -> Iterator[Constraint]:
    own = annotations.nodes.get(node)
    if own is None:
        return
    slots = annotations.slots
    pairs = [(producer, node) for producer in node.all_input_nodes]
    pairs += [(node, user) for user in node.users]
    for producer, user in pairs:
        other = producer if user is node else user
        if other not in annotations.nodes or own.inside(other):
            continue
        ends = (Slot(producer, OUTPUT), input_slot(user, producer))
        if any(map(slots.is_declined, ends)) or not any(map(slots.has_fields, ends)):
            continue
        yield Constraint(Rule.TIE, ends)


def _shared_operation(node: Node, annotations: Annotations) -> Iterator[Constraint]:
    own = annotations.nodes.get(node)
    if own is None or not own.match.shares:
        return
    slots = annotations.slots
    inputs = [Slot(node, index) for index in range(len(node.all_input_nodes))]
    if not any(slots.get(slot) is not None for slot in inputs):
        return
    found = (Slot(node, OUTPUT), *inputs)
    if packet_name(node) == "cat" and _is_per_channel_along(node, found, annotations):
        yield Constraint(Rule.SAME_DTYPE, found)
    else:
        yield Constraint(Rule.TIE, found)


def _is_per_channel_along(node: Node, found: tuple[Slot, ...], annotations: Annotations) -> bool:
    """Whether a quantizer has parameters of its own along the axis that ``cat`` joins."""
    tensor = tensor_of(node)
    if tensor is None:
        return False
    joined = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    for slot in found:
        proposal = annotations.slots.get(slot)
        if proposal is not None and proposal.fields:
            axis = proposal.fields["granularity"].value.axis
            if axis is not None and axis % tensor.dim() == int(joined) % tensor.dim():  # type: ignore[arg-type]
                return True
    return False


def _shared_state(node: Node, annotations: Annotations) -> Iterator[Constraint]:
    if not is_state(node) or len(node.users) < 2:
        return
    readers = [input_slot(user, node) for user in node.users if user in annotations.nodes]
    readers = [slot for slot in readers if annotations.slots.get(slot) is not None]
    if len(readers) >= 2:
        yield Constraint(Rule.TIE_STATE, tuple(readers))


def _kept_rank(node: Node, annotations: Annotations) -> Constraint:
    found = [Slot(node, OUTPUT)]
    if node.all_input_nodes:
        producer = node.all_input_nodes[0]
        found.insert(0, Slot(node, 0))
        if producer in annotations.nodes or packet_name(producer) in _SHAPE_OPERATIONS:
            found.append(Slot(producer, OUTPUT))
    for user in node.users:
        if user in annotations.nodes:
            found.append(input_slot(user, node))
        elif packet_name(user) in _SHAPE_OPERATIONS and user.all_input_nodes[0] is node:
            found.append(Slot(user, 0))
    return Constraint(Rule.TIE, tuple(found))


def _changed_rank(node: Node, annotations: Annotations) -> Iterator[Constraint]:
    slots = annotations.slots
    source: Node | None = node.all_input_nodes[0] if node.all_input_nodes else None
    while source is not None and slots.get(Slot(source, OUTPUT)) is None:
        goes_on = packet_name(source) in _CHANGES_RANK and source.all_input_nodes
        source = source.all_input_nodes[0] if goes_on else None
    if source is None:
        return
    targets: list[Slot] = []
    waiting = [node]
    while waiting:
        current = waiting.pop(0)
        for user in current.users:
            slot = input_slot(user, current)
            if slots.get(slot) is not None:
                targets.append(slot)
            if packet_name(user) in _CHANGES_RANK and slot.position == 0:
                waiting.append(user)
    if targets:
        yield Constraint(Rule.COPY, (Slot(source, OUTPUT), *targets))
