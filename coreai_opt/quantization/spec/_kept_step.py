"""A fake quantizer's training step on a tensor like the last: one call, which sees that all is as it was."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from coreai_kernels import backends
from coreai_kernels.ops.kept import keep_step
from coreai_opt.quantization.spec._plan import STATE, Plan
from coreai_opt.quantization.spec._switches import Flags

if TYPE_CHECKING:
    from coreai_opt.quantization.spec.fake_quantize import FakeQuantizeImplBase

__all__ = ["note_step", "repeat_step"]


def repeat_step(module: "FakeQuantizeImplBase", tensor: Tensor) -> Tensor | None:
    """The forward's output if only the tensor's values differ from the last step's, else None."""
    plan: Any = module.last_plan
    if plan is None or not plan.quiet.lasts() or backends.forced() not in (None, "native"):
        return None
    return plan.kept(tensor)  # type: ignore[no-any-return]


def note_step(module: "FakeQuantizeImplBase", plan: Plan, tensor: Tensor) -> None:
    """Have later forwards repeat the step on ``plan.state``, if they can; both switches are on."""
    if plan.kept_state is not plan.state and plan.packed_step is not None:
        calculator: Any = module._modules["qparams_calculator"]
        places = [
            *((calculator._buffers, name) for name in STATE),
            *((module._buffers, name) for name in Flags.NAMES),
        ]
        switches = [module._buffers[name] for name in Flags.NAMES]
        plan.kept = keep_step(tensor, plan.state, plan.keeps_range, plan.packed_step, places, switches)  # type: ignore[arg-type]
        plan.kept_state = plan.state
    # Not by assignment, which would be told to everybody.
    module.__dict__["last_plan"] = plan if plan.kept is not None else None
