"""``observe_range``: minimum and maximum of each block."""

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference.observe_range import observe_range as reference
from coreai_kernels.triton import registry as triton
from coreai_kernels.types import grid_shape

__all__ = ["observe_range"]


def _fake(input: Tensor, block_size: list[int]) -> tuple[Tensor, Tensor]:
    grid = grid_shape(input.shape, tuple(block_size))
    return input.new_empty(grid), input.new_empty(grid)


define(
    "observe_range",
    "(Tensor input, SymInt[] block_size) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    triton=triton.get("observe_range"),
)


def observe_range(input: Tensor, *, block_size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each block.

    If the input requires a gradient, the reference computes them, so that torch differentiates it: the
    gradient of a minimum is spread evenly over the elements that are equal to it.

    Args:
        input: float32, bfloat16, float16 or float64 tensor of any shape and strides.
        block_size: extent of a block along each axis; must divide the shape.

    Returns:
        Two tensors of the input's dtype and of shape ``input.shape[i] / block_size[i]``. A block with a NaN
        has NaN for both; negative zero comes out as zero.

    Raises:
        ValueError: the blocks do not tile the input.
        IndexError: a block is empty: it has no minimum.
        TypeError: ``input`` is not floating point.
    """
    checks.check_float_input("input", input)
    checks.check_blocks("block_size", input, block_size)
    if input.requires_grad and torch.is_grad_enabled():
        return reference(input, block_size)
    return implementation("observe_range")(input.detach(), block_size)  # type: ignore[no-any-return]
