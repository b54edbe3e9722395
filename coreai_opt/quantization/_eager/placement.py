"""Simulators on a model: built from a plan, then put in their places."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from coreai_opt._state_tensors import put_on_owners
from coreai_opt._utils.config_utils import original_type
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.axes import has_open_axis, with_default_axis
from coreai_opt.quantization._eager.call_sites import CallGroup, Origin, Site
from coreai_opt.quantization._eager.containers import hide_simulator
from coreai_opt.quantization._eager.interception import (
    WITH_SHORTCUT,
    Hook,
    LeafHook,
    ScopeHook,
    install,
)
from coreai_opt.quantization._eager.operations import LEAF_FORWARDS, OPERATIONS, is_in_place
from coreai_opt.quantization._eager.resolution import CallPlan, PlacementPlan, StatePlan
from coreai_opt.quantization._eager.trace import ModuleTrace, compressions_of
from coreai_opt.quantization.spec import QuantizationComponentFactory, QuantizationSpec
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["Simulators", "build", "insert", "install_hooks"]


@dataclass
class Simulators:
    """Simulators that are not on the model yet: by module and name, and by the state that they serve."""

    activations: list[tuple[nn.Module, str, FakeQuantizeImplBase]] = field(default_factory=list)
    states: list[tuple[StatePlan, FakeQuantizeImplBase]] = field(default_factory=list)

    def all(self) -> Iterator[FakeQuantizeImplBase]:
        """Each of them."""
        yield from (simulator for _, _, simulator in self.activations)
        yield from (simulator for _, simulator in self.states)


def build(plan: PlacementPlan) -> Simulators:
    """The simulators that the plan asks for.

    Raises:
        ValueError: a granularity leaves its axis open where there is no default.
        RuntimeError: a module already has something under a simulator's name.
    """
    simulators = Simulators()
    open_axes: list[str] = []
    for traced, calls in plan.calls:
        for name, spec, device in _named_specs(calls):
            full_name = f"{traced.name}.{name}".lstrip(".")
            if hasattr(traced.module, name):
                raise RuntimeError(
                    f"{type(traced.module).__name__} {traced.name!r} has an attribute {name!r}, "
                    f"the name of a simulator to be put there. Rename the attribute."
                )
            if has_open_axis(spec.granularity):
                open_axes.append(full_name)
                continue
            simulator = _construct(spec, CompressionTargetTensor.ACTIVATION, full_name, device)
            simulators.activations.append((traced.module, name, simulator))
    for state in plan.states:
        owner = state.owners[0]
        spec = with_default_axis(state.spec, owner.module, owner.name)
        full_name = f"{owner.module_name}.{owner.name}".lstrip(".")
        tensor = getattr(owner.module, owner.name)
        is_of_norm = owner.name == "weight" and tensor.dim() <= 1 and not state.is_asked_for
        if has_open_axis(spec.granularity) and not is_of_norm:
            open_axes.append(full_name)
            continue
        simulator = _construct(spec, CompressionTargetTensor.WEIGHT, full_name, tensor.device)
        if has_open_axis(spec.granularity):
            # Presets and the like are for weights of layers: they pass over the weights of norms.
            simulator._disable()
        # Its schedule is that of the configuration that its specification comes from.
        simulator.configured_by = state.configured_by
        simulators.states.append((state, simulator))
    if open_axes:
        raise ValueError(
            f"the granularities of these tensors need an axis, and there is no default for them: "
            f"{', '.join(open_axes)}. Defaults exist for the weights of linear, convolution and embedding "
            f"modules. Give an axis, e.g. PerChannelGranularity(axis=0)."
        )
    return simulators


def _named_specs(calls: list[CallPlan]) -> Iterator[tuple[str, QuantizationSpec, torch.device]]:
    for plan in calls:
        for operand, spec in plan.inputs:
            yield _input_name(plan, operand.name), spec, operand.device
        for index, spec in plan.outputs:
            result = plan.call.results[index]
            if result is not None:
                yield _output_name(plan, index), spec, result[1]


def _input_name(plan: CallPlan, operand: str) -> str:
    return f"{plan.call.label}_quantize_{operand}"


def _output_name(plan: CallPlan, index: int) -> str:
    return f"{plan.call.label}_quantize_output_{index}"


def _construct(
    spec: QuantizationSpec, target: CompressionTargetTensor, name: str, device: torch.device
) -> FakeQuantizeImplBase:
    simulator = QuantizationComponentFactory.create_fake_quantizer(spec, target).to(device)
    simulator.tensor_fqn = name
    simulator.disable_observer()
    simulator.disable_fake_quant()
    return simulator


def insert(simulators: Simulators) -> None:
    """Put the simulators on the model: as submodules, and as parametrizations of states."""
    for module, name, simulator in simulators.activations:
        module.add_module(name, simulator.train(module.training))
        hide_simulator(module, name)
    for state, simulator in simulators.states:
        for owner in state.owners:
            simulator.train(owner.module.training)
            hide_simulator(owner.module, "parametrizations")
        put_on_owners(simulator, [(owner.module, owner.name) for owner in state.owners])


def install_hooks(model: nn.Module, plan: PlacementPlan) -> None:
    """Hook modules so that the simulators of activations that are there are used."""
    hooks: dict[nn.Module, Hook] = {}
    for traced, calls in plan.calls:
        sites = {each.call.label: _site(traced.module, each) for each in calls}
        if any(sites.values()):
            hooks[traced.module] = _leaf_hook(traced, sites) or ScopeHook(
                traced.name, _groups(traced, calls, sites)
            )
    if not hooks:
        return
    scopes = [hook for hook in hooks.values() if isinstance(hook, ScopeHook)]
    counted = {group.operation for hook in scopes for group in hook.by_slot}
    for name, module in _modules_of_the_user(model):
        has_shortcut = isinstance(module, WITH_SHORTCUT)
        if module not in hooks and (has_shortcut or (scopes and not _calls_none(module, counted, plan))):
            hooks[module] = ScopeHook(name, {}, has_shortcut)
    for module, hook in hooks.items():
        install(hook, module)


def _calls_none(module: nn.Module, operations: set[str], plan: PlacementPlan) -> bool:
    """Whether the module's forward calls none of the operations, whatever the input and the mode are."""
    if module not in plan.counts or not original_type(module).__module__.startswith("torch.nn."):
        return False
    # Batch norms count batches by add_, in training mode alone.
    return not isinstance(module, _NormBase) and operations.isdisjoint(plan.counts[module])


def _modules_of_the_user(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have a forward, without simulators and what belongs to them."""
    ours: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, FakeQuantizeImplBase):
            ours.update(module.modules())
    for _, _, _, chain in compressions_of(model):
        ours.update(chain.modules())
    for name, module in model.named_modules():
        has_forward = type(module).forward is not nn.Module.forward or "forward" in module.__dict__
        if has_forward and module not in ours and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def _site(module: nn.Module, plan: CallPlan) -> Site | None:
    """What to do at the call, with those of the planned simulators that the module has."""
    inputs = [(operand.position, operand.name, _input_name(plan, operand.name)) for operand, _ in plan.inputs]
    outputs = [(index, _output_name(plan, index)) for index, _ in plan.outputs]
    inputs = [each for each in inputs if each[2] in module._modules]
    outputs = [each for each in outputs if each[1] in module._modules]
    if not inputs and not outputs:
        return None
    return Site(tuple(inputs), tuple(outputs), is_in_place(plan.call.operation))


def _leaf_hook(traced: ModuleTrace, sites: dict[str, Site | None]) -> LeafHook | None:
    """The hook of a module that calls one operation; None if there may be more to its forward."""
    module = traced.module
    operation = LEAF_FORWARDS.get(type(module).forward)
    if (
        operation is None
        or "forward" in module.__dict__
        or getattr(module, "padding_mode", "zeros") != "zeros"
    ):
        return None
    if traced.counts.get(operation) != 1:
        return None
    site = sites.get(operation)
    others = [each for label, each in sites.items() if label != operation and each is not None]
    if site is None or others or any(position for position, *_ in (*site.inputs, *site.outputs)):
        return None
    return LeafHook(site.inputs[0][2] if site.inputs else None, site.outputs[0][1] if site.outputs else None)


def _groups(
    traced: ModuleTrace, calls: list[CallPlan], sites: dict[str, Site | None]
) -> dict[Callable[..., Any], CallGroup]:
    """The simulated operations, by all the functions that perform them."""
    simulated = dict.fromkeys(plan.call.operation for plan in calls if sites[plan.call.label] is not None)
    groups: dict[Callable[..., Any], CallGroup] = {}
    for slot, operation in enumerate(simulated):
        own: list[Site | None] = [None] * traced.counts.get(operation, 0)
        functions = list(OPERATIONS[operation][1]) if operation in OPERATIONS else []
        for call in (plan.call for plan in calls if plan.call.operation == operation):
            if call.position is not None:
                own[call.position] = sites[call.label]
            functions.append(call.function)
        positions: dict[Origin, tuple[int, ...]] = {}
        for position, origin in enumerate(traced.origins.get(operation, ())):
            if origin is not None:
                positions[origin] = (*positions.get(origin, ()), position)
        group = CallGroup(operation, slot, tuple(own), positions)
        groups.update(dict.fromkeys(functions, group))
    return groups
