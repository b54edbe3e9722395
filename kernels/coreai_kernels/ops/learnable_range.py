"""``learnable_range``: quantize and dequantize with a range that gets a gradient."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels.formats import Format
from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import learnable_range as reference
from coreai_kernels.triton import registry as triton

__all__ = ["learnable_range"]


def _fake_backward(
    grad: Tensor, input: Tensor, low: Tensor | None, range: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(range), torch.empty_like(range)


define(
    "learnable_range_backward",
    "(Tensor grad, Tensor input, Tensor? low, Tensor range, int[] block_size, float level_low, "
    "float level_high) -> (Tensor, Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
    triton=triton.get("learnable_range_backward"),
)


class _LearnableRange(torch.autograd.Function):
    """The forward is ``fake_quantize``'s; the backward computes what it needs again from the input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, low: Tensor | None, range: Tensor, options: tuple[Any, ...]
    ) -> Tensor:
        block_size, level_low, level_high = options
        ctx.save_for_backward(input, low, range)
        ctx.options = options
        args = (range / level_high, None, low, block_size, int(Format.INT), level_low, level_high, False)
        return implementation("fake_quantize_forward")(input, *args)[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, low, range = ctx.saved_tensors
        gradients = implementation("learnable_range_backward")(grad, input, low, range, *ctx.options)
        return gradients[0], None if low is None else gradients[1], gradients[2], None


def learnable_range(
    input: Tensor,
    range: Tensor,
    low: Tensor | None = None,
    *,
    block_size: tuple[int, ...],
    level_low: float,
    level_high: float,
) -> Tensor:
    """Round ``input`` to ``level * range / level_high + low``, where ``level`` is an integer in between.

    As :func:`fake_quantize` rounds, with ``scale = range / level_high``. The gradient passes inside the
    range, and is zero outside. That to ``low`` is the sum of the gradients outside; that to ``range`` sums,
    over a block, ``grad`` times ``(output - input) / range`` inside, 1 above, and ``level_low / level_high``
    below: the derivatives of the definition with a straight-through rounding (Jain et al., arXiv 1903.08066).

    Args:
        input: float32, bfloat16, float16 or float64 tensor of any shape and strides.
        range: positive, one value a block, float32; its shape is that of the blocks' grid. Symmetric: the
            greatest value. Asymmetric: greatest minus least.
        low: the least value, as ``range``; None for symmetric quantization around zero.
        block_size: extent of a block along each axis; must divide the shape.
        level_low: lowest level; 0 if ``low`` is given.
        level_high: highest level, above zero.

    Returns:
        Tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError: levels, blocks or shapes do not fit.
        TypeError: ``input`` is not floating point, or a parameter is not float32.
    """
    checks.check_float_input("input", input)
    for name, value in (("range", range), ("low", low)):
        if value is not None and value.dtype != torch.float32:
            raise TypeError(f"{name} must be float32; got {value.dtype}")
    if not level_low <= 0 < level_high:
        raise ValueError(f"levels must satisfy level_low <= 0 < level_high; got {level_low} and {level_high}")
    if low is not None and level_low != 0:
        raise ValueError(f"level_low must be 0 where low is given; got {level_low}")
    grid = checks.check_blocks("block_size", input, block_size)
    checks.check_params(grid, input, range, None, None)
    if low is not None and low.shape != range.shape:
        raise ValueError(f"low must have the shape of range, {tuple(range.shape)}; got {tuple(low.shape)}")
    return _LearnableRange.apply(input, low, range, (block_size, float(level_low), float(level_high)))  # type: ignore[no-any-return]
