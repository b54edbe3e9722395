"""A fake quantizer's forward on a tensor like the last: one call, which sees that all is as it was."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from coreai_kernels.ops.kept import keep_single
from coreai_kernels.ops.library import reaches_kernels
from coreai_opt.quantization.spec._plan import STATE, Plan, same_methods
from coreai_opt.quantization.spec._switches import Flags
from coreai_opt.quantization.spec.qparams_calculator import StatefulQParamsCalculatorBase

if TYPE_CHECKING:
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["note_simulation", "note_step", "repeat_forward"]


def repeat_forward(module: "FakeQuantizeImplBase", tensor: Tensor) -> Tensor | None:
    """The forward's output if only the tensor's values differ from the last time, else None."""
    plan: Any = module.last_plan
    if plan is None or not plan.quiet.lasts() or not reaches_kernels():
        return None
    return plan.kept(tensor)  # type: ignore[no-any-return]


def note_step(module: "FakeQuantizeImplBase", plan: Plan, tensor: Tensor) -> None:
    """Have later forwards repeat the training step on ``plan.state``, if they can."""
    if plan.kept_for is not plan.state:
        args = (*plan.state, plan.keeps_range, plan.packed_step)
        _keep(module, plan, plan.state, "observe_and_fake_quantize_", tensor, args)
    # Not by assignment, which would be told to everybody.
    module.__dict__["last_plan"] = plan if plan.kept is not None else None


def note_simulation(module: "FakeQuantizeImplBase", plan: Plan, tensor: Tensor) -> None:
    """Have later forwards repeat the simulation with the calculator's parameters, if they can."""
    calculator: Any = module._modules["qparams_calculator"]
    buffers = calculator._buffers
    if not plan.is_built_in or not same_methods(calculator, StatefulQParamsCalculatorBase, ("get_qparams",)):
        return
    if plan.kept_for is not buffers["scale"]:
        args = plan.select(*map(buffers.get, STATE[:3]))
        # Views in the place of the buffers would outlive what they were made of.
        if any(
            value is not None and value is not buffers[name] for name, value in zip(STATE, args, strict=False)
        ):
            return
        _keep(module, plan, buffers["scale"], "fake_quantize_forward", tensor, (*args, *plan.values))
    module.__dict__["last_plan"] = plan if plan.kept is not None else None


def _keep(
    module: "FakeQuantizeImplBase",
    plan: Plan,
    kept_for: Any,
    operator: str,
    tensor: Tensor,
    args: tuple[Any, ...],
) -> None:
    calculator: Any = module._modules["qparams_calculator"]
    places = [
        *((calculator._buffers, name) for name in STATE),
        *((module._buffers, name) for name in Flags.NAMES),
    ]
    switches: list[Any] = [module._buffers[name] for name in Flags.NAMES]
    plan.kept = keep_single(operator, tensor, args, places, switches)
    plan.kept_for = kept_for
