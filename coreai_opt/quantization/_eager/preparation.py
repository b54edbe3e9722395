"""From a model and a configuration to a model with simulators that have seen example inputs."""

from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from coreai_opt._restoring import side_effects_undone, training_flags, undone_on_failure
from coreai_opt.config.spec import CompressionTargetTensor
from coreai_opt.quantization._eager.containers import show_simulator
from coreai_opt.quantization._eager.interception import remove_hooks
from coreai_opt.quantization._eager.placement import Simulators, build, insert, install_hooks
from coreai_opt.quantization._eager.resolution import boundary_modules, resolve
from coreai_opt.quantization._eager.trace import trace_forward
from coreai_opt.quantization._eager.unserved import UNSERVED, warn_of_unserved_states
from coreai_opt.quantization._observing import first_observations, tell_what_is_left, why_disabled
from coreai_opt.quantization.config import QuantizerConfig
from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["prepare", "set_flags", "simulators_of"]


def prepare(model: nn.Module, config: QuantizerConfig, example_inputs: Sequence[Any]) -> dict[str, str]:
    """Put simulators on the model and let them observe one forward.

    The model runs twice, in evaluation mode and without gradients: the first forward shows which operations
    it calls, the second one, with the parameters as they are, gives the ranges.

    Returns:
        Parameters that have a specification and no simulator, and why.

    Raises:
        ValueError, RuntimeError, NotImplementedError: the configuration does not fit the model; what the
            model raises passes. The model is as before then.
    """
    configs = config.build_module_config_dict(model)
    with undone_on_failure(model), side_effects_undone(model):
        with training_flags(model, False):
            trace = trace_forward(model, example_inputs, boundary_modules(configs))
        plan = resolve(trace, configs)
        left_out = dict.fromkeys(warn_of_unserved_states(model, configs, plan), UNSERVED)
        simulators = build(plan)
        insert(simulators)
        install_hooks(model, plan)
        set_flags(simulators.all(), observe=True, simulate=False)
        with training_flags(model, False), torch.no_grad(), first_observations(model) as masked:
            model(*example_inputs)
            _observe_unread_states(simulators)
        set_flags(simulators.all(), observe=False, simulate=True)
        tell_what_is_left((each.tensor_fqn, has_nan) for each, has_nan in masked.items())
        left_out |= {
            simulator.tensor_fqn: why_disabled(simulator)
            for _, simulator in simulators.states
            if simulator.is_disabled()
        }
        if _drop(simulators, masked):
            remove_hooks(model)
            install_hooks(model, plan)
        return left_out


def _observe_unread_states(simulators: Simulators) -> None:
    """Let a simulator observe its tensor where torch took a way around the parametrization."""
    for state, simulator in simulators.states:
        calculator = simulator.qparams_calculator
        scale = getattr(calculator, "scale", None)
        if scale is not None and scale.numel() == 0 and not simulator.is_disabled():
            simulator(getattr(state.owners[0].module.parametrizations, state.owners[0].name).original)


def _drop(simulators: Simulators, masked: Container[FakeQuantizeImplBase]) -> bool:
    """Take off the simulators whose blocks do not fit, and those of masks; whether there were any."""
    found = False
    for module, name, simulator in simulators.activations:
        if simulator.is_disabled() or simulator in masked:
            delattr(module, name)
            show_simulator(module, name)
            found = True
    for state, simulator in simulators.states:
        if simulator.is_disabled():
            for owner in state.owners:
                parametrize.remove_parametrizations(owner.module, owner.name, leave_parametrized=False)
                if not parametrize.is_parametrized(owner.module):
                    show_simulator(owner.module, "parametrizations")
            found = True
    return found


def simulators_of(model: nn.Module) -> Iterator[FakeQuantizeImplBase]:
    """The simulators on the model."""
    return (module for module in model.modules() if isinstance(module, FakeQuantizeImplBase))


def set_flags(simulators: Any, observe: bool, simulate: bool, simulate_weights: bool | None = None) -> None:
    """Switch simulators.

    Args:
        simulators: which ones.
        observe: whether they shall observe.
        simulate: whether they shall simulate.
        simulate_weights: the same for those of parameters and buffers, None for ``simulate``.
    """
    for simulator in simulators:
        simulator.enable_observer(observe)
        is_weight = simulator.quantization_target is CompressionTargetTensor.WEIGHT
        simulator.enable_fake_quant(
            simulate_weights if is_weight and simulate_weights is not None else simulate
        )
