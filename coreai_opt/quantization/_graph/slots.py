"""Places for quantizers, and what is proposed for them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.fx import Node

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization.spec import QuantizationSpec

__all__ = ["INTRINSIC", "OUTPUT", "SPEC_FIELDS", "Field", "Proposal", "Slot", "Slots"]

# Fields of a specification that are decided one by one.
SPEC_FIELDS = (
    "dtype",
    "qscheme",
    "qformulation",
    "granularity",
    "float_range",
    "fake_quantize_cls",
    "qparam_calculator_cls",
    "range_calculator_cls",
    "scale_dtype",
)
TARGET = "target"
# The priority of what follows from the operation itself: before all configurations.
INTRINSIC = -1
OUTPUT = -1


class Slot(NamedTuple):
    """An input or the output of a node.

    Fields:
        node: the node.
        position: in ``node.all_input_nodes``; OUTPUT for the output.
    """

    node: Node
    position: int

    @property
    def producer(self) -> Node:
        """The node whose tensor it is."""
        return self.node if self.position == OUTPUT else self.node.all_input_nodes[self.position]


class Field(NamedTuple):
    """A proposed value. The lower priority takes precedence."""

    value: Any
    priority: int


@dataclass(eq=False)
class Proposal:
    """What is proposed for the slots that share it, which will have one quantizer. Compared by identity.

    Fields:
        fields: by name; all or none.
        declined: the priority with which quantization is declined, None if it is not.
    """

    fields: dict[str, Field] = field(default_factory=dict)
    declined: int | None = None

    @classmethod
    def of(cls, spec: QuantizationSpec, target: CompressionTargetTensor, priority: int) -> "Proposal":
        """A specification, with one priority for all of it."""
        values = {name: Field(getattr(spec, name), priority) for name in SPEC_FIELDS}
        return cls(values | {TARGET: Field(target, priority)})

    def contents(self) -> tuple[dict[str, Field], int | None]:
        """For comparisons."""
        return dict(self.fields), self.declined


class Slots:
    """The slots of a graph that something is proposed for, and which of them share a proposal."""

    def __init__(self) -> None:
        self._proposals: dict[Slot, Proposal] = {}
        self._members: dict[Proposal, list[Slot]] = {}

    def get(self, slot: Slot) -> Proposal | None:
        """The slot's proposal; None if there is none."""
        return self._proposals.get(slot)

    def put(self, slot: Slot, proposal: Proposal) -> None:
        """Give the slot a proposal, alone or with those that have it already."""
        before = self._proposals.get(slot)
        if before is proposal:
            return
        if before is not None:
            self._members[before].remove(slot)
        self._proposals[slot] = proposal
        self._members.setdefault(proposal, []).append(slot)

    def members(self, proposal: Proposal) -> list[Slot]:
        """The slots that share the proposal."""
        return self._members.get(proposal, [])

    def with_sharers(self, slots: Iterable[Slot]) -> list[Slot]:
        """``slots`` and all those that share a proposal with one of them."""
        found: dict[Slot, None] = {}
        for slot in slots:
            found[slot] = None
            proposal = self.get(slot)
            if proposal is not None:
                found.update(dict.fromkeys(self.members(proposal)))
        return list(found)

    def has_fields(self, slot: Slot) -> bool:
        """Whether a quantizer is proposed, be it declined or not."""
        proposal = self.get(slot)
        return proposal is not None and bool(proposal.fields)

    def is_declined(self, slot: Slot) -> bool:
        """Whether quantization is declined."""
        proposal = self.get(slot)
        return proposal is not None and proposal.declined is not None

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._proposals)
