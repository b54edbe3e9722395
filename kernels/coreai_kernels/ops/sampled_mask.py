"""``sampled_mask``: a weight times a mask drawn at random from logits, in one pass."""

from typing import Any

import torch
from torch import Tensor

from coreai_kernels.ops import checks
from coreai_kernels.ops.library import define, implementation
from coreai_kernels.reference import sampled_mask as reference
from coreai_kernels.triton import registry as triton

__all__ = ["sampled_mask"]

_FORWARD = "(Tensor weight, Tensor logits, Tensor draw, int seed) -> Tensor"


def _fake_backward(grad: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight, dtype=torch.float32)


# The gradient of the second is known to the dispatcher, for compiled programs; eager mode calls the first,
# which is quicker, inside its own autograd function.
for _name in ("sampled_mask_forward", "sampled_mask"):
    define(
        _name,
        _FORWARD,
        reference=reference.forward,
        fake=lambda weight, *args: torch.empty_like(weight),
        triton=triton.get("sampled_mask_forward"),
    )
define(
    "sampled_mask_backward",
    "(Tensor grad, Tensor weight, Tensor logits, Tensor draw, int seed) -> (Tensor, Tensor)",
    reference=reference.backward,
    fake=_fake_backward,
    triton=triton.get("sampled_mask_backward"),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, logits, draw, ctx.seed = inputs
    ctx.save_for_backward(weight, logits, draw)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    to_weight, to_logits = implementation("sampled_mask_backward")(grad, *ctx.saved_tensors, ctx.seed)
    return to_weight, to_logits, None, None


torch.library.register_autograd("coreai_kernels::sampled_mask", _backward, setup_context=_setup_context)


class _SampledMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, draw: Tensor, seed: int) -> Tensor:
        _setup_context(ctx, (weight, logits, draw, seed), weight)
        return implementation("sampled_mask_forward")(weight, logits, draw, seed)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        return _backward(ctx, grad)


def sampled_mask(weight: Tensor, logits: Tensor, draw: Tensor, *, seed: int) -> Tensor:
    """``weight * mask``, where each element of the mask is 1 with probability ``sigmoid(logit)``.

    With a fresh uniform ``u`` an element, ``z = logit + log(u / (1 - u))`` and ``mask = 1[sigmoid(z) > 1/2]``
    (Louizos et al., arXiv 1712.01312, without the stretch). The gradients are ``grad * mask`` to the weight
    and, straight through the threshold, ``grad * weight * sigmoid'(z)`` to the logits.

    The random numbers are Philox 4x32-7 of ``seed``, ``draw`` and the element's place in memory: every
    backend, thread count and rank draws the same ones. Neither they nor the mask are kept for the backward
    pass, which computes them again.

    Args:
        weight: float32, bfloat16, float16 or float64 tensor, computed in float32.
        logits: tensor of the weight's shape, on its device; other dtypes than float32 are converted.
        draw: int64 tensor of one element on the same device: which draw this is. It must not be changed in
            place before the backward pass.
        seed: from 0 to ``2**63 - 1``; tensors that are masked together take different ones.

    Returns:
        Tensor of the weight's shape, dtype and memory format.

    Raises:
        TypeError: a dtype is not allowed.
        ValueError: a shape, a device or the seed is not allowed.
    """
    checks.check_float_input("weight", weight)
    checks.check_float_input("logits", logits)
    if logits.shape != weight.shape or logits.device != weight.device:
        raise ValueError(
            f"logits must have the weight's shape {tuple(weight.shape)} and device {weight.device}; "
            f"got {tuple(logits.shape)} on {logits.device}"
        )
    if draw.dtype != torch.int64:
        raise TypeError(f"draw must be int64; got {draw.dtype}")
    if draw.numel() != 1 or draw.device != weight.device:
        raise ValueError(
            f"draw must have one element, on the weight's device {weight.device}; "
            f"got shape {tuple(draw.shape)} on {draw.device}"
        )
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must lie in [0, 2**63); got {seed}")
    if logits.dtype != torch.float32:
        logits = logits.float()
    if weight.dtype == torch.float64:
        return sampled_mask(weight.float(), logits, draw, seed=seed).double()
    if torch.compiler.is_compiling():
        return torch.ops.coreai_kernels.sampled_mask(weight, logits, draw, seed)  # type: ignore[no-any-return]
    return _SampledMask.apply(weight, logits, draw, seed)  # type: ignore[no-any-return]
