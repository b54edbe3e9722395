"""``foreach_fake_quantize`` and ``foreach_observe_and_fake_quantize``: lists of tensors in one launch.

What a small tensor costs is the call, not the arithmetic. A list pays for one call: one operator, one node of
the autograd graph, one set of threads or, on a GPU, a launch or few.
"""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_not
from typing import Any

import torch
from torch import Tensor

from coreai_kernels.formats import Format, ScaleFormat
from coreai_kernels.ops import fake_quantize as fake_quantize_op
from coreai_kernels.ops import observe_and_fake_quantize as step_op
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.quant_config import QuantConfig, taking_config
from coreai_kernels.reference import foreach as reference
from coreai_kernels.triton import registry as triton
from coreai_kernels.types import RangeUpdate

__all__ = [
    "apply",
    "apply_step",
    "foreach_fake_quantize",
    "foreach_observe_and_fake_quantize",
    "takes",
]

# Tensors or None: scale, zero point, minimum and, of a step, running minimum and maximum.
Row = tuple[Any, ...]


def _fake_forward(inputs: list[Tensor], *args: Any) -> tuple[list[Tensor], Tensor]:
    size = reference.mask_starts(inputs)[-1] if args[-1] else 0
    outputs = [torch.empty_like(x) for x in inputs]
    return outputs, torch.empty(size, dtype=torch.uint8, device=inputs[0].device if inputs else None)


def _fake_backward(grads: list[Tensor], mask: Tensor, starts: list[int], orders: list[int]) -> list[Tensor]:
    split = reference.split_block_sizes(grads, orders) if orders else [()] * len(grads)
    return [
        fake_quantize_op.fake_backward(grad, mask, list(order))
        for grad, order in zip(grads, split, strict=True)
    ]


define(
    "foreach_fake_quantize_forward",
    "(Tensor[] inputs, Tensor[] scales, Tensor[] zero_points, Tensor[] minvals, int[] block_sizes, "
    "int format, float quant_min, float quant_max, bool with_mask) -> (Tensor[], Tensor)",
    reference=reference.fake_quantize_forward,
    fake=_fake_forward,
    triton=triton.get("foreach_fake_quantize_forward"),
)
define(
    "foreach_fake_quantize_backward",
    "(Tensor[] grads, Tensor mask, int[] starts, int[] orders) -> Tensor[]",
    reference=reference.backward,
    fake=_fake_backward,
    triton=triton.get("foreach_fake_quantize_backward"),
)
# For gradients that nobody else holds, which autograd's nodes in C++ can tell.
define(
    "foreach_fake_quantize_backward_",
    "(Tensor(a!)[] grads, Tensor mask, int[] starts, int[] orders) -> ()",
    reference=reference.backward_,
    fake=lambda *args: None,
    triton=triton.get("foreach_fake_quantize_backward_"),
)
_triton_step = triton.get("foreach_observe_and_fake_quantize_")
define(
    "foreach_observe_and_fake_quantize_",
    "(Tensor[] inputs, Tensor(a!)[] scales, Tensor(b!)[] zero_points, Tensor(c!)[] minvals, "
    "Tensor(d!)[] running_mins, Tensor(e!)[] running_maxs, bool has_running, "
    + QuantConfig.SCHEMA.replace("block_size", "block_sizes")
    + ", bool with_mask) -> (Tensor[], Tensor)",
    reference=taking_config(reference.observe_and_fake_quantize_),
    fake=_fake_forward,
    triton=taking_config(_triton_step) if _triton_step else None,
)


class StraightThroughList(torch.autograd.Function):
    """The gradient around an operator on lists that does not record it."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Callable[..., Any],
        args: tuple[Any, ...],
        starts: list[int],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Outputs of ``operator(inputs, *args, True)``, whose masks begin at ``starts``."""
        outputs, mask = operator(inputs, *args, True)
        ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)
        ctx.starts = starts
        is_row_major = all(map(Tensor.is_contiguous, outputs))
        ctx.orders = None if is_row_major else [fake_quantize_op.layout_of(output) for output in outputs]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients where the masks are set; None where none came."""
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for gradients of these gradients
            orders = ctx.orders or [[]] * len(grads)
            singly = zip(grads, ctx.starts, orders, strict=True)
            return None, None, None, *(_one_gradient(grad, mask, *its) for grad, *its in singly)
        operator = implementation("foreach_fake_quantize_backward")
        if ctx.orders is None and all(map(is_not, grads, repeat(None))):
            return None, None, None, *operator(grads, mask, ctx.starts, [])
        given = [i for i, grad in enumerate(grads) if grad is not None]
        orders = []
        if ctx.orders is not None:
            for i in given:
                orders += ctx.orders[i] or range(grads[i].dim())  # type: ignore[union-attr]
        results: list[Tensor | None] = [None] * len(grads)
        found = operator([grads[i] for i in given], mask, [ctx.starts[i] for i in given], orders)
        for i, grad in zip(given, found, strict=True):
            results[i] = grad
        return None, None, None, *results


def _one_gradient(grad: Tensor | None, mask: Tensor, start: int, order: list[int]) -> Tensor | None:
    if grad is None:
        return None
    its_mask = mask[start : start + (grad.numel() + 7) // 8]
    return fake_quantize_op.masked_gradient(grad, its_mask, order)


def takes(input: Tensor, state: Row) -> bool:
    """Whether the list operators can do the tensor: not float64, nor with state of other dtypes."""
    return input.dtype != torch.float64 and step_op.is_plain(input, state)


def _shared_out(
    inputs: Sequence[Tensor],
    states: Sequence[Row],
    one: Callable[[int], Tensor],
    several: Callable[[list[int]], Sequence[Tensor]],
) -> list[Tensor]:
    """Outputs of ``several``, called for each device and for what needs a gradient or not; or of ``one``."""
    if torch.compiler.is_compiling():  # a compiled program has no calls to save
        return [one(i) for i in range(len(inputs))]
    records = torch.is_grad_enabled()
    groups: dict[tuple[bool, torch.device], list[int]] = {}
    outputs: list[Any] = [None] * len(inputs)
    for i, (x, state) in enumerate(zip(inputs, states, strict=True)):
        if takes(x, state):
            groups.setdefault((records and x.requires_grad, x.device), []).append(i)
        else:
            outputs[i] = one(i)
    for indices in groups.values():
        for i, output in zip(indices, several(indices), strict=True):
            outputs[i] = output
    return outputs


def _call(name: str, inputs: list[Tensor], rows: Sequence[Row], args: tuple[Any, ...]) -> Sequence[Tensor]:
    """Outputs of a list operator for tensors that all need a gradient or all do not.

    Args:
        name: the operator.
        inputs: tensors on one device, which :func:`takes` them.
        rows: state or parameters of each tensor; all have None in the same places.
        args: the operator's arguments after them, but for the last.
    """
    columns = zip(*rows, strict=True)
    args = (*([] if column[0] is None else list(column) for column in columns), *args)
    operator = implementation(name)
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        if fake_quantize_op.records_gradient(operator):
            return operator(inputs, *args, True)[0]  # type: ignore[no-any-return]
        starts = reference.mask_starts(inputs)[:-1]
        return StraightThroughList.apply(operator, args, starts, *inputs)  # type: ignore[no-any-return]
    return operator(inputs, *args, False)[0]  # type: ignore[no-any-return]


def apply(
    inputs: Sequence[Tensor],
    params: Sequence[Row],
    block_sizes: Sequence[tuple[int, ...]],
    format: int,
    quant_min: float,
    quant_max: float,
) -> list[Tensor]:
    """:func:`foreach_fake_quantize` without the checks. All have the same kinds of parameters."""

    def one(i: int) -> Tensor:
        scale, zero_point, minval = params[i]
        settings = (block_sizes[i], format, quant_min, quant_max)
        return fake_quantize_op.apply(inputs[i], scale, zero_point, minval, *settings)

    def several(indices: list[int]) -> Sequence[Tensor]:
        rows, blocks = [params[i] for i in indices], [block_sizes[i] for i in indices]
        args = (list(chain.from_iterable(blocks)), format, quant_min, quant_max)
        return _call("foreach_fake_quantize_forward", [inputs[i] for i in indices], rows, args)

    return _shared_out(inputs, params, one, several)


def apply_step(
    inputs: Sequence[Tensor],
    states: Sequence[Row],
    has_running: bool,
    block_sizes: Sequence[tuple[int, ...]],
    config: QuantConfig,
) -> list[Tensor]:
    """:func:`foreach_observe_and_fake_quantize` without the checks. All keep the same kinds of state.

    ``config`` is what they have in common: its block size is not used.
    """

    def one(i: int) -> Tensor:
        return step_op.apply(inputs[i], states[i], has_running, config.with_block_size(block_sizes[i]))

    def several(indices: list[int]) -> Sequence[Tensor]:
        rows, blocks = [states[i] for i in indices], [block_sizes[i] for i in indices]
        args = (has_running, list(chain.from_iterable(blocks)), *config.arguments()[1:])
        return _call("foreach_observe_and_fake_quantize_", [inputs[i] for i in indices], rows, args)

    return _shared_out(inputs, states, one, several)


def _columns(count: int, **lists: Sequence[Tensor] | None) -> list[Row]:
    """Rows of the lists, None in the columns that are not given."""
    for name, values in lists.items():
        if values is not None and len(values) != count:
            raise ValueError(
                f"{name} must have one entry for each of the {count} inputs; it has {len(values)}"
            )
    return list(zip(*([None] * count if v is None else v for v in lists.values()), strict=True))


def foreach_fake_quantize(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor] | None = None,
    minvals: Sequence[Tensor] | None = None,
    *,
    block_sizes: Sequence[tuple[int, ...]],
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
) -> list[Tensor]:
    """:func:`coreai_kernels.fake_quantize` of each tensor, in one launch.

    Outputs and gradients have the bits of the single calls. The gradients of all tensors arrive together, so
    a list is for small ones. A compiled program calls the single operator for each tensor.

    Args:
        inputs: tensors of any shapes, strides and dtypes that the single function takes.
        scales: one for each input.
        zero_points: one for each input, or None.
        minvals: one for each input, or None.
        block_sizes: one for each input.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        format: a :class:`coreai_kernels.Format`.

    Returns:
        One tensor for each input, none of which shares memory with another.

    Raises:
        ValueError: lengths differ, or block size, parameter shapes or range do not fit.
        TypeError: an input is not floating point.
    """
    params = _columns(len(inputs), scales=scales, zero_points=zero_points, minvals=minvals)
    _columns(len(inputs), block_sizes=block_sizes)  # type: ignore[arg-type]
    for x, (scale, zero_point, minval), block_size in zip(inputs, params, block_sizes, strict=True):
        fake_quantize_op.check(x, scale, zero_point, minval, block_size, format, quant_min, quant_max)
    return apply(inputs, params, block_sizes, format, quant_min, quant_max)


def foreach_observe_and_fake_quantize(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor] | None = None,
    minvals: Sequence[Tensor] | None = None,
    running_mins: Sequence[Tensor] | None = None,
    running_maxs: Sequence[Tensor] | None = None,
    *,
    block_sizes: Sequence[tuple[int, ...]],
    scheme: int,
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
    use_minval: bool = False,
    update: int = RangeUpdate.LATEST,
    has_running: bool = False,
    averaging_constant: float = 0.01,
    range_min: float | None = None,
    range_max: float | None = None,
    scale_format: int = ScaleFormat.FLOAT32,
) -> list[Tensor]:
    """:func:`coreai_kernels.observe_and_fake_quantize` of each tensor, in one launch.

    Outputs, states and gradients have the bits of the single calls; see :func:`foreach_fake_quantize`. The
    lists have one entry for each input; the other arguments are the single function's, common to all.

    Raises:
        ValueError: lengths differ, a state is given twice, or an argument does not fit.
        IndexError: a block is empty.
        TypeError: an input is not floating point.
    """
    states = _columns(
        len(inputs),
        scales=scales,
        zero_points=zero_points,
        minvals=minvals,
        running_mins=running_mins,
        running_maxs=running_maxs,
    )
    _columns(len(inputs), block_sizes=block_sizes)  # type: ignore[arg-type]
    identities = [id(value) for row in states for value in row if value is not None]
    if len(set(identities)) < len(identities):
        raise ValueError("each tensor needs a state of its own; one of the given states is there twice")
    config = QuantConfig(
        block_size=(),
        scheme=scheme,
        format=format,
        quant_min=quant_min,
        quant_max=quant_max,
        use_minval=use_minval,
        update=update,
        averaging_constant=averaging_constant,
        range_min=range_min,
        range_max=range_max,
        scale_format=scale_format,
    )
    for x, row, block_size in zip(inputs, states, block_sizes, strict=True):
        step_op.check(x, row, config.with_block_size(block_size))
    return apply_step(inputs, states, has_running, block_sizes, config)
