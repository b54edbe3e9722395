"""``fake_quantize``: quantize and dequantize in one pass, with a straight-through gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from coreai_kernels import backends, native
from coreai_kernels.formats import Format
from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import fake_quantize as reference
from coreai_kernels.reference.layout import memory_order
from coreai_kernels.runtime.inductor import is_exporting, recompute_masks
from coreai_kernels.triton import registry as triton

__all__ = [
    "apply",
    "check",
    "fake_backward",
    "fake_quantize",
    "layout_of",
    "mask_bytes",
    "masked_gradient",
    "records_gradient",
    "register_straight_through",
    "straight_through",
]

_ARGUMENTS = (
    "(Tensor input, Tensor scale, Tensor? zero_point, Tensor? minval, int[] block_size, int format, "
    "float quant_min, float quant_max, bool with_mask) -> (Tensor, Tensor)"
)


def mask_bytes(input: Tensor, with_mask: bool) -> Tensor:
    """Uninitialised packed mask for ``input``: one bit an element, or nothing."""
    size = (input.numel() + 7) // 8 if with_mask else 0
    return torch.empty(size, dtype=torch.uint8, device=input.device)


def _fake_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), mask_bytes(input, args[-1])


def fake_backward(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """Shape function of the gradient."""
    if not order:
        return torch.empty_like(grad, memory_format=torch.contiguous_format)
    empty = grad.new_empty([grad.size(axis) for axis in order])
    return empty.permute([order.index(axis) for axis in range(grad.dim())])


def _backward_reference(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    return reference.backward(grad, mask, order or list(range(grad.dim())))


def _backward_in_place_reference(grad: Tensor, mask: Tensor, order: list[int]) -> None:
    grad.copy_(_backward_reference(grad, mask, order))


# Eager mode calls this one, whose gradient is not known to Python's part of the dispatcher: that costs a few
# microseconds more than a node of its own, see `straight_through`. TorchScript's tracer records it, too.
define(
    "fake_quantize_forward",
    _ARGUMENTS,
    reference=reference.forward,
    fake=_fake_forward,
    triton=triton.get("fake_quantize_forward"),
)
# The same kernel with its gradient known to the dispatcher, for compiled and exported programs, whose sizes
# may be symbols.
define(
    "fake_quantize",
    _ARGUMENTS.replace("int[]", "SymInt[]"),
    reference=reference.forward,
    fake=_fake_forward,
    triton=triton.get("fake_quantize_forward"),
)
define(
    "fake_quantize_backward",
    "(Tensor grad, Tensor mask, int[] order) -> Tensor",
    reference=_backward_reference,
    fake=fake_backward,
    triton=triton.get("fake_quantize_backward"),
)
# For a gradient that nobody else holds, which autograd's nodes in C++ can tell. Where few elements are
# outside the range, little is read but the mask.
define(
    "fake_quantize_backward_",
    "(Tensor(a!) grad, Tensor mask, int[] order) -> ()",
    reference=_backward_in_place_reference,
    fake=lambda *args: None,
    triton=triton.get("fake_quantize_backward_"),
)


def layout_of(output: Tensor) -> list[int]:
    """Memory order of a dense tensor as the backward operator takes it: empty for row-major."""
    return [] if output.is_contiguous() else memory_order(output)


def masked_gradient(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """Straight-through gradient: ``grad`` where the packed mask is set, ``grad * 0`` elsewhere."""
    if grad.requires_grad and torch.is_grad_enabled():  # for a gradient of this gradient
        return _MaskedGradient.apply(grad, mask, order)  # type: ignore[no-any-return]
    return implementation("fake_quantize_backward")(grad, mask, order)  # type: ignore[no-any-return]


def _compiled_gradient(grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
    """:func:`masked_gradient` in a program that is compiled.

    The compiler knows who else reads the gradient, and leaves out the copy if nobody does.
    """
    if not grad.permute(order or list(range(grad.dim()))).is_contiguous():
        return masked_gradient(grad, mask, order)
    result = grad.clone()
    torch.ops.coreai_kernels.fake_quantize_backward_(result, mask, order)
    return result


class _MaskedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, mask: Tensor, order: list[int]) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.order = order
        return masked_gradient(grad, mask, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return masked_gradient(grad, mask, ctx.order), None, None


def register_straight_through(name: str) -> None:
    """Give operator ``name``, whose first results are output and packed mask, its gradient to the input."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[1])
        ctx.order = layout_of(output[0])
        ctx.arguments = len(inputs)

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return masked_gradient(grad, mask, ctx.order), *(None,) * (ctx.arguments - 1)

    torch.library.register_autograd(f"coreai_kernels::{name}", backward, setup_context=setup_context)


register_straight_through("fake_quantize")


def records_gradient(operator: Callable[..., Any]) -> bool:
    """Whether a straight-through operator adds its node to autograd's graph itself, in C++."""
    return native.autograd_missing is None and type(operator) is torch._ops.OpOverload


def straight_through(input: Tensor, operator: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    """Output of ``operator(input, *args, with_mask)``, in eager mode, with the straight-through gradient."""
    if not records_gradient(operator):
        if not torch.compiler.is_compiling() and has_tangent(input):
            return _StraightThroughOfDual.apply(input, operator, args)  # type: ignore[no-any-return]
        if input.requires_grad and torch.is_grad_enabled():
            if torch.jit.is_tracing():  # type: ignore[attr-defined]
                return _straight_through_for_tracer(input, operator, args)
            return StraightThrough.apply(input, operator, args)  # type: ignore[no-any-return]
    return operator(input, *args, False)[0]  # type: ignore[no-any-return]


def _straight_through_for_tracer(
    input: Tensor, operator: Callable[..., Any], args: tuple[Any, ...]
) -> Tensor:
    """The output, plus a zero that has the gradient: the tracer loses the gradient of Python's functions."""
    output, mask = operator(input, *args, True)
    passed = _backward_reference(input, mask, layout_of(output))
    return output.detach() + (passed - passed.detach()).nan_to_num()  # type: ignore[no-any-return]


def has_tangent(input: Tensor) -> bool:
    """Whether the tensor carries a tangent of forward-mode differentiation."""
    level = forward_ad._current_level
    return level >= 0 and forward_ad.unpack_dual(input, level=level).tangent is not None


class StraightThrough(torch.autograd.Function):
    """The gradient around an operator that does not record it."""

    # The arguments come as one tuple: autograd looks at every argument of its own, for microseconds.
    @staticmethod
    def forward(ctx: Any, input: Tensor, operator: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        """Output of ``operator(input, *args, True)``."""
        output, mask = operator(input, *args, True)
        ctx.save_for_backward(mask)
        ctx.order = layout_of(output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Gradient where the mask is set."""
        (mask,) = ctx.saved_tensors
        compiling = torch.compiler.is_compiling() and not is_exporting()
        masked = _compiled_gradient if compiling and backends.forced() != "reference" else masked_gradient
        return masked(grad, mask, ctx.order), None, None


class _StraightThroughOfDual(StraightThrough):
    """The same for inputs with a tangent. A class of its own: torch.compile refuses those that define one."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, operator: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
        output, mask = operator(input, *args, True)
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        ctx.order = layout_of(output)
        return output  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (mask,) = ctx.saved_tensors
        return masked_gradient(tangent, mask, ctx.order)


def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    minval: Tensor | None = None,
    *,
    block_size: tuple[int, ...],
    quant_min: float,
    quant_max: float,
    format: int = Format.INT,
) -> Tensor:
    """Round ``input`` to the values that a quantized tensor can represent.

    With offset ``o`` (``minval`` if given, else 0) and zero point ``z`` (``zero_point``; ``quant_min`` if
    ``minval`` is given; else 0), per element and in float32::

        INT      q = round_half_even((x - o) / scale) + z     y = (clamp(q) - z) * scale + o
        others   q = x / scale                                y = round_to_format(clamp(q)) * scale

    The gradient is the straight-through estimator's (Bengio et al., arXiv 1308.3432): ``grad * inside``,
    where ``inside`` is ``quant_min <= q <= quant_max``. Backward keeps one bit per element.

    Args:
        input: float32, bfloat16, float16 or float64 tensor of any shape and strides.
        scale: one value per block; shape ``input.shape[i] / block_size[i]``; float32 computes as is, other
            floating dtypes are converted.
        zero_point: int32, shape of ``scale``. Zero-point formulation.
        minval: float32, shape of ``scale``. Min-value formulation.
        block_size: extent of a block along each axis; must divide the shape.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        format: a :class:`coreai_kernels.Format`.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: block size, parameter shapes or range do not fit.
        TypeError: ``input`` is not floating point.
    """
    check(input, scale, zero_point, minval, block_size, format, quant_min, quant_max)
    return apply(input, scale, zero_point, minval, block_size, format, quant_min, quant_max)


def check(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    format: int,
    quant_min: float,
    quant_max: float,
) -> None:
    """Raise what :func:`fake_quantize` raises for bad arguments."""
    checks.check_float_input("input", input)
    checks.check_range(Format(format), quant_min, quant_max)
    grid = checks.check_blocks("block_size", input, block_size)
    checks.check_params(grid, input, scale, zero_point, minval)


def apply(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    minval: Tensor | None,
    block_size: tuple[int, ...],
    format: int,
    quant_min: float,
    quant_max: float,
) -> Tensor:
    """:func:`fake_quantize` without the argument checks, for callers that have made them."""
    scale = scale.float().contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    minval = None if minval is None else minval.float().contiguous()
    args = (scale, zero_point, minval, block_size, format, quant_min, quant_max)
    if torch.compiler.is_compiling() and backends.forced() != "reference":
        needs_grad = input.requires_grad and torch.is_grad_enabled()
        if needs_grad and not is_exporting():
            recompute_masks()
        return torch.ops.coreai_kernels.fake_quantize(input, *args, needs_grad)[0]  # type: ignore[no-any-return]
    return straight_through(input, implementation("fake_quantize_forward"), args)
