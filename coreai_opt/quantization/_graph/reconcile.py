"""Neighbours agree on quantizers: constraints are applied until nothing changes."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.fx import Graph

from coreai_opt.quantization._graph.annotate import Annotations
from coreai_opt.quantization._graph.constraints import Constraint, Rule, constraints_at
from coreai_opt.quantization._graph.slots import Field, Proposal, Slot, Slots

__all__ = ["reconcile"]

_ROUNDS = 100


def reconcile(graph: Graph, annotations: Annotations) -> None:
    """Apply the constraints of all nodes, and again those of nodes whose slots change by that.

    Raises:
        RuntimeError: inputs of a concatenation that is quantized along its axis have no quantizer to agree on
            a dtype with; or the constraints contradict each other without end.
    """
    waiting: deque[Constraint] = deque()
    for node in graph.nodes:
        waiting.extend(constraints_at(node, annotations))
    left = _ROUNDS * sum(1 + len(node.all_input_nodes) for node in graph.nodes)
    while waiting:
        if left == 0:
            raise RuntimeError(
                "the specifications of neighbouring operations contradict each other: they change each other "
                "without end. Give the operations around a reshape or a concatenation equal specifications."
            )
        left -= 1
        changed = _apply(waiting.popleft(), annotations.slots)
        for node in dict.fromkeys(slot.node for slot in changed):
            waiting.extend(constraints_at(node, annotations))


def _apply(constraint: Constraint, slots: Slots) -> list[Slot]:
    """Apply one constraint; return the slots that changed."""
    match constraint.rule:
        case Rule.TIE:
            return _tie(constraint.slots, slots, _declined_if_nothing_else)
        case Rule.TIE_STATE:
            return _tie(constraint.slots, slots, _declined_by_priority)
        case Rule.SAME_DTYPE:
            return _same_dtype(constraint.slots, slots)
        case Rule.COPY:
            return _copy(constraint.slots[0], constraint.slots[1:], slots)


_Decide = Callable[[dict[str, Field], list[int]], bool]


def _tie(given: Sequence[Slot], slots: Slots, is_declined: _Decide) -> list[Slot]:
    members = slots.with_sharers(given)
    before = {slot: slots.get(slot) for slot in members}
    proposals = list(dict.fromkeys(each for each in before.values() if each is not None))
    if len(proposals) == 1 and None not in before.values():
        return []
    fields = _merged([each.fields for each in proposals if each.fields])
    declines = [each.declined for each in proposals if each.declined is not None]
    merged = Proposal(fields)
    if declines and is_declined(fields, declines):
        merged = Proposal(declined=min(declines))
    contents = {slot: each.contents() if each is not None else None for slot, each in before.items()}
    sizes = {each: len(slots.members(each)) for each in proposals}
    for slot in members:
        slots.put(slot, merged)
    return [
        slot
        for slot in members
        if contents[slot] != merged.contents() or _grew(before[slot], sizes, len(members))
    ]


def _grew(before: Proposal | None, sizes: dict[Proposal, int], now: int) -> bool:
    return before is None or sizes[before] != now


def _declined_if_nothing_else(fields: dict[str, Field], declines: list[int]) -> bool:
    return not fields


def _declined_by_priority(fields: dict[str, Field], declines: list[int]) -> bool:
    return not fields or min(declines) <= min(each.priority for each in fields.values())


def _merged(proposals: Sequence[dict[str, Field]]) -> dict[str, Field]:
    """Field by field the value of the lowest priority; of equal ones that whose text comes first."""
    if not proposals:
        return {}
    return {name: _merged_field(name, [each[name] for each in proposals]) for name in proposals[0]}


def _merged_field(name: str, fields: list[Field]) -> Field:
    priority = min(each.priority for each in fields)
    if name == "float_range":
        return Field(_union([each.value for each in fields]), priority)
    return Field(min(fields, key=lambda each: (each.priority, str(each.value))).value, priority)


def _union(ranges: Iterable[Sequence[float | None]]) -> list[float | None]:
    """The smallest range around all of them; None for an end that is open in one."""
    lows, highs = zip(*ranges, strict=True)
    return [
        None if None in lows else min(lows),
        None if None in highs else max(highs),
    ]


def _same_dtype(given: Sequence[Slot], slots: Slots) -> list[Slot]:
    missing = [slot for slot in given if not slots.has_fields(slot)]
    if missing:
        node = given[0].node
        raise RuntimeError(
            f"{node.name!r} concatenates along the axis of its quantizers' channels: then all its inputs and "
            f"its output need a specification, or none of them. Without one are: "
            f"{', '.join(_described(slot) for slot in missing)}"
        )
    proposals = {slot: slots.get(slot) for slot in given}
    found = [each for each in proposals.values() if each is not None]
    merged = _merged_field("dtype", [each.fields["dtype"] for each in found])
    return _write(found, {"dtype": merged}, slots)


def _described(slot: Slot) -> str:
    return "the output" if slot.position < 0 else f"input {slot.position} ({slot.producer.name!r})"


def _copy(source: Slot, targets: Sequence[Slot], slots: Slots) -> list[Slot]:
    given = slots.get(source)
    if given is None or given.declined is not None or not given.fields:
        return []
    found: list[Proposal] = []
    for slot in targets:
        proposal: Any = slots.get(slot)
        if proposal is not None and proposal.fields and proposal.declined is None:
            found.append(proposal)
    return _write(found, {name: given.fields[name] for name in ("qscheme", "float_range")}, slots)


def _write(proposals: Iterable[Proposal], fields: dict[str, Field], slots: Slots) -> list[Slot]:
    changed = []
    for proposal in dict.fromkeys(proposals):
        if any(proposal.fields[name] != value for name, value in fields.items()):
            proposal.fields.update(fields)
            changed += slots.members(proposal)
    return changed
