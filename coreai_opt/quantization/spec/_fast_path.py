"""A fake quantizer's captured calls: what they depend on, and when a forward can be captured."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from coreai_kernels.ops.observe_and_fake_quantize import is_plain
from coreai_kernels.runtime import Generation, Guarded, capture
from coreai_opt.quantization.spec._generation import generation_of
from coreai_opt.quantization.spec._plan import STATE, QuantizationPlan, same_methods, settings_generation
from coreai_opt.quantization.spec._switches import Flags
from coreai_opt.quantization.spec.qparams_calculator import StatefulQParamsCalculatorBase

__all__ = ["Decision", "capture_simulation", "capture_step"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Decision(NamedTuple):
    """What a forward has gone by: the switches with their generation, and that of the settings."""

    thrown: object
    switches: tuple[bool, bool, bool]
    settings: tuple[object, ...]


def capture_step(module: nn.Module, plan: QuantizationPlan, tensor: Tensor, decision: Decision) -> None:
    """Capture the training step on ``plan.state``, which the calculator's buffers are."""
    if is_plain(tensor, plan.state):
        args = (*plan.state, plan.keeps_range, plan.packed_config)
        _capture(module, "observe_and_fake_quantize_", tensor, args, STATE, decision)


def capture_simulation(module: nn.Module, plan: QuantizationPlan, tensor: Tensor, decision: Decision) -> None:
    """Capture the simulation with the calculator's parameters, if that is what the forward does."""
    calculator: Any = module._modules["qparams_calculator"]
    buffers = calculator._buffers
    if not plan.is_built_in or not same_methods(calculator, StatefulQParamsCalculatorBase, ("get_qparams",)):
        return
    if tensor.numel() == 0:  # parameters of any grid serve it
        return
    params = plan.select(*map(buffers.get, STATE[:3]))
    # A view in the place of a buffer would outlive what it was made of.
    are_buffers = all(
        value is None or value is buffers[name] for name, value in zip(STATE, params, strict=False)
    )
    if are_buffers and is_plain(tensor, params):
        _capture(module, "fake_quantize_forward", tensor, (*params, *plan.values), STATE[:3], decision)


def _capture(
    module: Any,
    operator: str,
    tensor: Tensor,
    args: tuple[Any, ...],
    names: tuple[str, ...],
    decision: Decision,
) -> None:
    """Capture a call with buffers of these names first, unless another thread changed what it goes by.

    The guard is of what is when it is made, later than the decision: all is looked at again after that.
    """
    own = module.__dict__  # not by assignment, which would begin a new generation
    # One object: another thread may capture at the same time.
    known, its_decision = own.get("_capture", (None, None))
    calls = capture(
        known if its_decision == decision else None, lambda: _guarded(module), operator, tensor, args
    )
    buffers = module._modules["qparams_calculator"]._buffers
    now = Decision(module._flags.thrown.now, module._current_flags().values(), settings_generation(module))
    if now != decision or any(
        value is not None and value is not buffers[name] for name, value in zip(names, args, strict=False)
    ):
        calls = None
    own["_capture"] = calls, decision
    own["_captured"] = calls


def _guarded(module: nn.Module) -> Guarded:
    calculator: Any = module._modules["qparams_calculator"]
    ranges: Any = calculator._modules["range_calculator"]
    parts = (module, calculator, ranges)
    switches: list[Any] = [module._buffers[name] for name in Flags.NAMES]
    # The simulator's own hooks are torch's business, which calls them around the forward. The fused operators
    # stand for calls of the other two.
    return Guarded(
        slots=[
            (module._modules, "qparams_calculator"),
            (calculator._modules, "range_calculator"),
            *((generation_of(each), Generation.KEY) for each in parts),
            (module._flags.thrown, Generation.KEY),  # type: ignore[union-attr, list-item]
            *((calculator._buffers, name) for name in STATE),
            *((module._buffers, name) for name in Flags.NAMES),
        ],
        switches=switches,
        hooks=[
            *(vars(each)[name] for each in (calculator, ranges) for name in _HOOKS),
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
        ],
        classes=[type(each) for each in parts],
    )
