"""From what neighbours agreed on to specifications: one for each quantizer, and who shares it."""

from dataclasses import dataclass, field

from torch.fx import Graph, Node

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._graph.annotate import is_floating
from coreai_opt.quantization._graph.nodes import is_quantizable
from coreai_opt.quantization._graph.slots import INTRINSIC, OUTPUT, SPEC_FIELDS, TARGET, Proposal, Slot, Slots
from coreai_opt.quantization.spec import QuantizationScheme, QuantizationSpec
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["Place", "Planned", "Placement", "resolve"]


@dataclass(frozen=True)
class Place:
    """Where a quantizer stands: on the way to one reader, or behind the producer for all readers.

    Fields:
        producer: the node whose tensor it is.
        reader: the node that reads it; None for all.
    """

    producer: Node
    reader: Node | None = None


@dataclass(frozen=True, eq=False)
class Planned:
    """A quantizer to be: places that have the same object share it."""

    spec: QuantizationSpec
    target: CompressionTargetTensor


@dataclass
class Placement:
    """What is to be quantized, in the order of the graph: of a node its inputs, then its output.

    Fields:
        places: what quantizes there; a quantizer itself where the model has one already.
    """

    places: dict[Place, Planned | FakeQuantizeImplBase] = field(default_factory=dict)

    def in_order(self, graph: Graph) -> list[tuple[Place, Planned | FakeQuantizeImplBase]]:
        """The places in the order of ``graph``."""
        found = []
        for node in graph.nodes:
            edges = [Place(producer, node) for producer in node.all_input_nodes]
            found += [(place, self.places[place]) for place in (*edges, Place(node)) if place in self.places]
        return found


def resolve(graph: Graph, slots: Slots) -> Placement:
    """Make specifications of proposals.

    Raises:
        pydantic.ValidationError: what was agreed on excludes each other.
    """
    placement = Placement()
    planned: dict[Proposal, Planned] = {}
    for node in graph.nodes:
        for slot in (*(Slot(node, index) for index in range(len(node.all_input_nodes))), Slot(node, OUTPUT)):
            proposal = slots.get(slot)
            if proposal is None or not proposal.fields or proposal.declined is not None:
                continue
            if not is_quantizable(slot.producer):
                continue
            if proposal not in planned:
                planned[proposal] = _planned(proposal)
            place = Place(slot.producer, None if slot.position == OUTPUT else node)
            placement.places[place] = planned[proposal]
    return placement


def _planned(proposal: Proposal) -> Planned:
    values = {name: proposal.fields[name].value for name in SPEC_FIELDS}
    if proposal.fields["qscheme"].priority == INTRINSIC and is_floating(proposal):
        values["qscheme"] = QuantizationScheme.SYMMETRIC
    return Planned(QuantizationSpec(**values), proposal.fields[TARGET].value)
