"""What a configuration asks for at each operation of a traced model."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from coreai_opt._utils.config_utils import ConfigLevel, full_match
from coreai_opt.export.parametrized import is_finalized
from coreai_opt.quantization._eager.operations import OPERATIONS
from coreai_opt.quantization._eager.trace import Call, Identity, ModuleTrace, Operand, State, Trace
from coreai_opt.quantization.config.quantization_config import (
    ModuleQuantizerConfig,
    OpQuantizerConfig,
    QuantizerConfig,
)
from coreai_opt.quantization.spec import QuantizationSpec

__all__ = [
    "CallPlan",
    "ModuleConfigs",
    "PlacementPlan",
    "StatePlan",
    "boundary_modules",
    "check_positions",
    "resolve",
]

logger = logging.getLogger(__name__)

Specs = Mapping[Any, QuantizationSpec | None]
ModuleConfigs = Mapping[ConfigLevel, dict[str, ModuleQuantizerConfig]]

_MISSING: Any = object()


@dataclass
class CallPlan:
    """The simulators of one call: its operands, and the positions of its results, with specifications."""

    call: Call
    inputs: list[tuple[Operand, QuantizationSpec]] = field(default_factory=list)
    outputs: list[tuple[int, QuantizationSpec]] = field(default_factory=list)


@dataclass(frozen=True)
class StatePlan:
    """The simulator of a parameter or buffer.

    Attributes:
        owners: all the owners that hold the tensor.
        spec: its specification.
        configured_by: the name of the module whose configuration has it.
        is_asked_for: whether it is the specification of a module's state, not of whatever operations read.
    """

    owners: tuple[State, ...]
    spec: QuantizationSpec
    configured_by: str
    is_asked_for: bool


@dataclass
class PlacementPlan:
    """Which simulators a model gets.

    Attributes:
        calls: those of activations, module by module in the order of calls.
        states: those of parameters and buffers.
        counts: how often each module that ran called each operation, simulated or not.
    """

    calls: list[tuple[ModuleTrace, list[CallPlan]]] = field(default_factory=list)
    states: list[StatePlan] = field(default_factory=list)
    counts: dict[nn.Module, dict[str, int]] = field(default_factory=dict)


def resolve(trace: Trace, configs: ModuleConfigs) -> PlacementPlan:
    """Decide on simulators.

    A specification for a module's boundary comes before one for operations. Of several for one tensor, the
    innermost module's holds. Of several operations that read one parameter, the last one holds, in the order
    of the configurations' levels.
    """
    by_name = {name: config for level in configs.values() for name, config in level.items()}
    received, returned = _boundaries(trace, by_name)
    plan = PlacementPlan()
    for traced in trace.modules.values():
        plan.counts[traced.module] = traced.counts
        operations = list(dict.fromkeys(call.operation for call in traced.calls.values()))
        # Operation by operation: the order that simulators have in the model.
        calls = [
            _plan_call(traced, call, by_name[traced.name], received, returned)
            for call in sorted(traced.calls.values(), key=lambda each: operations.index(each.operation))
        ]
        if any(each.inputs or each.outputs for each in calls):
            plan.calls.append((traced, calls))
    plan.states = _plan_states(trace, configs, by_name)
    return plan


def boundary_modules(configs: ModuleConfigs) -> frozenset[str]:
    """Names of the modules whose inputs or outputs have specifications."""
    return frozenset(
        name
        for level in configs.values()
        for name, config in level.items()
        if config.module_input_spec or config.module_output_spec
    )


def check_positions(config: QuantizerConfig) -> None:
    """NotImplementedError if tensors of operations or modules are named by anything but positions and "*"."""
    _check_entry("global_config", config.global_config)
    for field_name in ("module_type_configs", "module_name_configs"):
        for key, entry in getattr(config, field_name).items():
            _check_entry(f"{field_name}[{key!r}]", entry)


def _check_entry(where: str, entry: ModuleQuantizerConfig | OpQuantizerConfig | None) -> None:
    for field_name in ("op_input_spec", "op_output_spec", "module_input_spec", "module_output_spec"):
        for key in getattr(entry, field_name, None) or {}:
            if key != "*" and not isinstance(key, int):
                raise NotImplementedError(
                    f"{field_name} of {where}: tensors are named by their position, such as 0, or by '*' for "
                    f"all; got {key!r}"
                )
    for field_name in ("op_type_config", "op_name_config"):
        for key, named in (getattr(entry, field_name, None) or {}).items():
            _check_entry(f"{where}.{field_name}[{key!r}]", named)


def _boundaries(
    trace: Trace, configs: Mapping[str, ModuleQuantizerConfig]
) -> tuple[dict[Identity, QuantizationSpec | None], dict[Identity, QuantizationSpec | None]]:
    """Specifications of the tensors that modules receive and return, by their identity."""
    received: dict[Identity, QuantizationSpec | None] = {}
    returned: dict[Identity, QuantizationSpec | None] = {}
    receivers: dict[Identity, str] = {}
    overridden: dict[str, None] = {}
    for name, tensors in trace.inputs:
        for index, identity in tensors:
            spec = _lookup(configs[name].module_input_spec, index)
            if spec is _MISSING:
                continue
            if identity in received and received[identity] != spec:
                overridden[f"{name!r} holds, not that of {receivers[identity]!r}"] = None
            received[identity], receivers[identity] = spec, name
    if overridden:
        logger.warning(
            f"module_input_spec of several modules is for one tensor: that of {'; that of '.join(overridden)}"
        )
    for name, tensors in trace.outputs:
        for index, identity in tensors:
            spec = _lookup(configs[name].module_output_spec, index)
            # Inner modules return first, and theirs holds.
            if spec is not _MISSING:
                returned.setdefault(identity, spec)
    return received, returned


def _plan_call(
    traced: ModuleTrace,
    call: Call,
    config: ModuleQuantizerConfig,
    received: Mapping[Identity, QuantizationSpec | None],
    returned: Mapping[Identity, QuantizationSpec | None],
) -> CallPlan:
    entry = _entry_for(traced, call, config)
    plan = CallPlan(call)
    for operand in call.operands:
        if operand.owners:
            continue
        spec = received.get(operand.identity, _MISSING)
        if spec is _MISSING and entry is not None:
            spec = _lookup(entry.op_input_spec, operand.position)
        if spec is _MISSING or spec is None:
            continue
        if operand.is_quantizable:
            plan.inputs.append((operand, spec))
        elif operand.position in (entry.op_input_spec or {} if entry is not None else {}):
            logger.warning(
                f"op_input_spec names input {operand.position} of {_full_name(traced, call)!r}, which is no "
                f"floating-point tensor of more than one element: it is not quantized"
            )
    for index, result in enumerate(call.results):
        if result is None:
            continue
        spec = returned.get(result[0], _MISSING)
        if spec is _MISSING and entry is not None:
            spec = _lookup(entry.op_output_spec, index)
        if spec is not _MISSING and spec is not None:
            plan.outputs.append((index, spec))
    return plan


def _plan_states(
    trace: Trace, configs: ModuleConfigs, by_name: Mapping[str, ModuleQuantizerConfig]
) -> list[StatePlan]:
    names = list(_in_order_of_precedence(configs))
    traces = {traced.name: traced for traced in trace.modules.values()}
    chosen: dict[int, tuple[tuple[State, ...], QuantizationSpec | None, str, bool]] = {}
    for traced in (traces[name] for name in names if name in traces):
        for call in traced.calls.values():
            entry = _entry_for(traced, call, by_name[traced.name])
            for operand in call.operands:
                if operand.owners and operand.is_quantizable and entry is not None:
                    spec = _state_spec(entry.op_state_spec, operand, traced.name)
                    if spec is not _MISSING:
                        chosen[operand.identity[0]] = (operand.owners, spec, traced.name, False)
    rank = {name: index for index, name in enumerate(names)}
    for traced in trace.modules.values():
        for call in traced.calls.values():
            for operand in call.operands:
                for owner in sorted(operand.owners, key=lambda each: rank[each.module_name]):
                    spec = _lookup(by_name[owner.module_name].module_state_spec, owner.name)
                    if spec is not _MISSING and operand.is_quantizable:
                        chosen[operand.identity[0]] = (operand.owners, spec, owner.module_name, True)
    found = [
        StatePlan(owners, spec, configured_by, is_asked_for)
        for owners, spec, configured_by, is_asked_for in chosen.values()
        if spec is not None and not any(is_finalized(owner.module, owner.name) for owner in owners)
    ]
    return sorted(found, key=lambda plan: plan.owners[0].rank)


def _state_spec(specs: Specs | None, operand: Operand, module_name: str) -> Any:
    """What is said of a parameter or buffer under one of its names: the running module's comes first."""
    names = sorted(operand.owners, key=lambda owner: owner.module_name != module_name)
    named = (owner.name for owner in names if owner.name in (specs or {}))
    return _lookup(specs, next(named, names[0].name))


def _in_order_of_precedence(configs: ModuleConfigs) -> Iterator[str]:
    """Names of modules: of two, what is configured for the later one holds."""
    for level in sorted(configs, key=lambda each: each.value, reverse=True):
        # What takes precedence comes first in a level.
        yield from reversed(configs[level])


def _entry_for(
    traced: ModuleTrace, call: Call, config: ModuleQuantizerConfig
) -> ModuleQuantizerConfig | OpQuantizerConfig | None:
    """What the module's configuration says about the operation; None if it is none of those it is for."""
    if call.operation not in OPERATIONS:
        return None
    entry: Any = (config.op_type_config or {}).get(call.operation, config)
    for pattern, named in (config.op_name_config or {}).items():
        if full_match(pattern, _full_name(traced, call)):
            entry = named
    return entry  # type: ignore[no-any-return]


def _full_name(traced: ModuleTrace, call: Call) -> str:
    return f"{traced.name}.{call.label}" if traced.name else call.label


def _lookup(specs: Specs | None, key: Any) -> Any:
    specs = specs or {}
    return specs.get(key, specs.get("*", _MISSING))
