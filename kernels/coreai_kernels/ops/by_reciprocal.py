"""``fake_quantize_by_reciprocal``: the simulator of torchao's training, and torch's own fake quantization."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels.ops.fake_quantize import has_tangent
from coreai_kernels.ops.fake_quantize import straight_through as with_straight_through
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import by_reciprocal as reference
from coreai_kernels.triton import registry as triton

__all__ = ["fake_quantize_by_reciprocal"]


def _fake_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    mask = input.new_empty((input.numel() + 7) // 8 if args[-1] else 0, dtype=torch.uint8)
    return input.new_empty(input.shape), mask


define(
    "fake_quantize_by_reciprocal_",
    "(Tensor input, Tensor(a!) scale, Tensor(b!) zero_point, SymInt run, bool chooses, bool is_symmetric, "
    "float quant_min, float quant_max, float eps, bool with_mask) -> (Tensor, Tensor)",
    reference=reference.forward_,
    fake=_fake_forward,
    triton=triton.get("fake_quantize_by_reciprocal_"),
)
define(
    "fake_quantize_by_reciprocal_backward",
    "(Tensor grad, Tensor mask, Tensor scale, SymInt run) -> Tensor",
    reference=reference.backward,
    fake=lambda grad, *args: grad.new_empty(grad.shape),
    triton=triton.get("fake_quantize_by_reciprocal_backward"),
)


class _ByReciprocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, zero_point: Tensor, *options: Any) -> Tensor:
        output, mask = _forward(input, scale, zero_point, *options, True)
        ctx.save_for_backward(mask, scale)
        ctx.run = options[0]
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mask, scale = ctx.saved_tensors
        if grad.requires_grad and torch.is_grad_enabled():  # for a gradient of this gradient
            to_input = reference.backward(grad, mask, scale, ctx.run)
        else:
            backward = implementation("fake_quantize_by_reciprocal_backward")
            to_input = backward(grad.contiguous(), mask, scale, ctx.run)
        return to_input, *(None,) * 8


def fake_quantize_by_reciprocal(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    run: int,
    chooses: bool,
    is_symmetric: bool,
    quant_min: int,
    quant_max: int,
    eps: float,
    straight_through: bool = False,
) -> Tensor:
    """Round and clip ``input * (1 / scale) + zero_point``, and go back, as torchao's eager simulator does.

    Bit for bit, but for the sign of NaN. The gradient inside the range is ``grad * scale * (1 / scale)``,
    rounded twice, and zero outside.

    With ``straight_through`` the gradient is ``grad * inside``. That and the values are those of
    ``torch.fake_quantize_per_tensor_affine`` and ``torch.fake_quantize_per_channel_affine`` where
    ``input * (1 / scale)`` fits an int64.

    Args:
        input: contiguous float32 tensor, blocks of ``run`` elements one after another.
        scale: float32, one a block, contiguous; written if ``chooses``.
        zero_point: int32, likewise.
        run: elements of a block, a multiple of 8 that divides the last axis.
        chooses: whether scale and zero point are chosen from the blocks' ranges first.
        is_symmetric: whether the zero points that are chosen are 0.
        quant_min: smallest quantized value.
        quant_max: largest quantized value.
        eps: the least scale that is chosen.
        straight_through: which gradient.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: strides, ``run`` or the number of parameters are not allowed.
    """
    for name, tensor, dtype in (
        ("input", input, torch.float32),
        ("scale", scale, torch.float32),
        ("zero_point", zero_point, torch.int32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}")
    last = input.shape[-1] if input.dim() else 0
    if run < 8 or run % 8 or last % run:
        raise ValueError(f"run must be a multiple of 8 that divides the last axis, {last}; got {run}")
    if not scale.numel() == zero_point.numel() == input.numel() // run:
        raise ValueError(
            f"scale and zero_point must have one value a block, that is {input.numel() // run}; "
            f"got {scale.numel()} and {zero_point.numel()}"
        )
    options = (run, chooses, is_symmetric, float(quant_min), float(quant_max), eps)
    if straight_through:
        return with_straight_through(input, _forward, (scale, zero_point, *options))
    if (input.requires_grad and torch.is_grad_enabled()) or has_tangent(input):  # torch refuses the latter
        return _ByReciprocal.apply(input, scale, zero_point, *options)  # type: ignore[no-any-return]
    return _forward(input.detach(), scale, zero_point, *options, False)[0]


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return implementation("fake_quantize_by_reciprocal_")(*args)  # type: ignore[no-any-return]
