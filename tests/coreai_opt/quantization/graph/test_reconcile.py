"""How neighbours agree, slot by slot."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph

from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization import ModuleQuantizerConfig, QuantizationSpec, QuantizerConfig
from coreai_opt.quantization._graph.constraints import Constraint, Rule
from coreai_opt.quantization._graph.reconcile import _apply
from coreai_opt.quantization._graph.slots import OUTPUT, Proposal, Slot, Slots
from coreai_opt.quantization.spec import PerChannelGranularity

from .support import Function, prepared, x

ACTIVATION = CompressionTargetTensor.ACTIVATION


def slots_of(*proposals: Proposal | None) -> tuple[Slots, tuple[Slot, ...]]:
    """The outputs of as many nodes, with these proposals."""
    graph = Graph()
    found = tuple(Slot(graph.placeholder(f"x{index}"), OUTPUT) for index in range(len(proposals)))
    slots = Slots()
    for slot, proposal in zip(found, proposals, strict=True):
        if proposal is not None:
            slots.put(slot, proposal)
    return slots, found


def proposed(priority: int, **fields: Any) -> Proposal:
    return Proposal.of(QuantizationSpec(**fields), ACTIVATION, priority)


def value(slots: Slots, slot: Slot, name: str) -> Any:
    proposal = slots.get(slot)
    assert proposal is not None
    return proposal.fields[name].value


def test_a_tie_takes_each_field_from_who_takes_precedence() -> None:
    slots, (one, other) = slots_of(proposed(3, dtype="uint8"), proposed(1, dtype="int4"))
    assert _apply(Constraint(Rule.TIE, (one, other)), slots)
    assert slots.get(one) is slots.get(other)
    assert value(slots, one, "dtype") == torch.int4
    assert not _apply(Constraint(Rule.TIE, (one, other)), slots)


def test_equal_priorities_take_what_comes_first_by_name() -> None:
    slots, (one, other) = slots_of(
        proposed(1, dtype="uint8", qscheme="asymmetric"), proposed(1, dtype="int8", qscheme="symmetric")
    )
    _apply(Constraint(Rule.TIE, (one, other)), slots)
    assert value(slots, one, "dtype") == torch.int8
    assert str(value(slots, one, "qscheme")) == "asymmetric"


def test_ranges_widen_whatever_the_priority() -> None:
    slots, (one, other) = slots_of(proposed(1, float_range=[-1, 1]), proposed(2, float_range=[0, 6]))
    _apply(Constraint(Rule.TIE, (one, other)), slots)
    assert value(slots, one, "float_range") == [-1.0, 6.0]
    slots, (one, other) = slots_of(proposed(1, float_range=[-1, 1]), proposed(2))
    _apply(Constraint(Rule.TIE, (one, other)), slots)
    assert value(slots, one, "float_range") == [None, None]


def test_a_tie_reaches_those_who_share_already() -> None:
    slots, (one, two, three) = slots_of(proposed(1), None, proposed(2, dtype="uint8"))
    _apply(Constraint(Rule.TIE, (two, three)), slots)
    _apply(Constraint(Rule.TIE, (one, two)), slots)
    assert value(slots, three, "dtype") == torch.int8


def test_declining_gives_way_to_any_proposal_but_for_states() -> None:
    for rule, declined in ((Rule.TIE, False), (Rule.TIE_STATE, True)):
        slots, (one, other) = slots_of(Proposal(declined=0), proposed(1))
        _apply(Constraint(rule, (one, other)), slots)
        assert slots.is_declined(other) is declined
    slots, (one, other) = slots_of(Proposal(declined=2), proposed(1))
    _apply(Constraint(Rule.TIE_STATE, (one, other)), slots)
    assert not slots.is_declined(one)


def test_a_copy_takes_scheme_and_range_alone() -> None:
    source = proposed(5, dtype="uint8", qscheme="asymmetric", float_range=[0, 1])
    slots, (one, other, declined) = slots_of(source, proposed(1), Proposal(declined=1))
    changed = _apply(Constraint(Rule.COPY, (one, other, declined)), slots)
    assert changed == [other]
    assert value(slots, other, "dtype") == torch.int8
    assert str(value(slots, other, "qscheme")) == "asymmetric"
    assert value(slots, other, "float_range") == [0.0, 1.0]


def test_one_dtype_without_one_quantizer() -> None:
    slots, (one, other) = slots_of(proposed(1, dtype="int4"), proposed(2))
    _apply(Constraint(Rule.SAME_DTYPE, (one, other)), slots)
    assert slots.get(one) is not slots.get(other)
    assert value(slots, other, "dtype") == torch.int4


def test_a_concatenation_along_channels_says_which_input_has_no_specification() -> None:
    spec = QuantizationSpec(granularity=PerChannelGranularity(axis=1))
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_input_spec={"*": spec}, op_output_spec=None)
    )
    model = Function(lambda m, a, b: torch.cat([a, b], 1))
    with pytest.raises(RuntimeError, match="the output"):
        prepared(model, x(2, 3), x(2, 3), config=config)


def test_what_cannot_be_one_specification_is_refused() -> None:
    floats = ModuleQuantizerConfig(op_input_spec={"*": QuantizationSpec(dtype="float8_e4m3fn")})
    config = QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_output_spec={"*": QuantizationSpec(qscheme="asymmetric")}),
        module_name_configs={"b": floats},
    )
    model = Function(lambda m, t: m.b(m.a(t).view(1, 8)), a=nn.Linear(4, 4), b=nn.Linear(8, 2))
    with pytest.raises(ValueError, match="symmetric"):
        prepared(model, x(2, 4), config=config)
