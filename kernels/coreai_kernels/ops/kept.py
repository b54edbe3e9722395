"""State of operators that the native backend keeps from call to call.

To hand hundreds of state tensors over takes longer than to quantize a small tensor. Here the native backend
gets them once and gives a number for them; a call names the number and brings the inputs alone. A single
tensor's step becomes a function.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coreai_kernels import native
from coreai_kernels.ops import observe_and_fake_quantize as step_op
from coreai_kernels.ops.library import define_native

__all__ = ["Kept", "keep", "keep_step"]

_PARAMETERS = "(Tensor[] scales, Tensor[] zero_points, Tensor[] minvals, "
_keepers = {
    "foreach_fake_quantize_forward": define_native(
        "keep_fake_quantize",
        _PARAMETERS + "int[] block_sizes, int format, float quant_min, float quant_max) -> int",
    ),
    "foreach_observe_and_fake_quantize_": define_native(
        "keep_observe_and_fake_quantize_",
        _PARAMETERS
        + "Tensor[] running_mins, Tensor[] running_maxs, bool has_running, "
        + step_op.CONFIG.replace("int[] block_size", "int[] block_sizes").removesuffix(", bool with_mask")
        + ") -> int",
    ),
}
_run = define_native("run_kept", "(Tensor[] inputs, int number, bool with_mask) -> (Tensor[], Tensor)")
_guard = define_native("guard_kept", "(Tensor[] inputs, Tensor[] switches, int number) -> ()")
_drop = define_native("drop_kept", "(int number) -> ()")
# For the library beside this one: the result is an address.
_can_keep_step = define_native(
    "keep_step",
    "(Tensor input, Tensor scale, Tensor? zero_point, Tensor? minval, Tensor? running_min, "
    "Tensor? running_max, bool has_running, Tensor settings) -> int",
)


class Kept:
    """A list operator's arguments between the inputs and ``with_mask``, kept by the native backend.

    Args:
        number: what it calls them.
        drop: lets go of them.
    """

    __slots__ = ("__weakref__", "_number")

    def __init__(self, number: int, drop: Callable[[int], None]) -> None:
        self._number = number
        weakref.finalize(self, drop, number).atexit = False

    def __call__(self, inputs: list[Tensor], with_mask: bool) -> Any:
        """The operator's results; no outputs if there is a guard that does not hold."""
        return _run(inputs, self._number, with_mask)  # type: ignore[misc]

    def guard(self, inputs: list[Tensor], switches: list[Tensor]) -> None:
        """Let calls give outputs as long as inputs have these dtypes and shapes, and switches their values.

        Args:
            inputs: what it will be called with.
            switches: tensors of one byte each, on the CPU.
        """
        with torch.no_grad():
            _guard(inputs, switches, self._number)  # type: ignore[misc]


def keep(name: str, args: tuple[Any, ...]) -> Kept | None:
    """Have the native backend keep the arguments of a list operator.

    Args:
        name: the operator.
        args: its arguments between the inputs and ``with_mask``.

    Returns:
        What runs the operator on CPU tensors; None if there is no native backend, or the state is elsewhere.
    """
    keeper = _keepers[name]
    if keeper is None or _drop is None or any(not scale.is_cpu for scale in args[0]):
        return None
    with torch.no_grad():
        return Kept(keeper(*args), _drop)


def keep_step(
    input: Tensor,
    state: tuple[Tensor | None, ...],
    has_running: bool,
    settings: Tensor,
    places: Sequence[tuple[dict[str, Tensor | None], str]],
    switches: Sequence[Tensor],
) -> Callable[[Tensor], Tensor | None] | None:
    """A function that does the step of ``observe_and_fake_quantize_``, past the dispatcher.

    It takes tensors like ``input`` and returns the output, with its gradient. It returns None, and does
    nothing, if the tensor differs from ``input`` in dtype, shape, strides or device; if one of the places
    holds another tensor than now, or the tensor there its values elsewhere; if a switch has another value; or
    if a mode is active that would have a say in the operator's call.

    Args:
        input: a tensor of the kind.
        state: scale, zero point, minimum, running minimum, running maximum.
        has_running: whether the running range holds one already.
        settings: what :func:`coreai_kernels.ops.observe_and_fake_quantize.packed` makes of them.
        places: dictionaries and keys whose tensors have to stay: where the state is from.
        switches: tensors of one byte each.

    Returns:
        None if there can be no such function: for large tensors, for float64, on other devices, for state of
        other dtypes than the kernels keep or in another order than the blocks, or without the native parts.
    """
    if _can_keep_step is None or native.autograd is None or not step_op.is_plain(input, state):
        return None
    return native.autograd.keep_step(  # type: ignore[no-any-return]
        input, state, has_running, settings, list(places), list(switches)
    )
