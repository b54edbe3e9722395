"""Operations on lists of tensors: what the same operation does to each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from coreai_kernels.quant_config import QuantConfig
from coreai_kernels.reference import fake_quantize
from coreai_kernels.reference.observe_and_fake_quantize import observe_and_fake_quantize

__all__ = [
    "MASK_ALIGNMENT",
    "backward",
    "backward_",
    "fake_quantize_forward",
    "mask_starts",
    "observe_and_fake_quantize_",
    "split_block_sizes",
]

# Bytes: masks start at multiples, as vector loads on a GPU ask for.
MASK_ALIGNMENT = 16


def mask_starts(inputs: Sequence[Tensor]) -> list[int]:
    """Where each tensor's mask starts in the common one; behind the last of them, its size in bytes."""
    starts = [0]
    unit = 8 * MASK_ALIGNMENT
    for x in inputs:
        starts.append(starts[-1] + (x.numel() + unit - 1) // unit * MASK_ALIGNMENT)
    return starts


def split_block_sizes(inputs: Sequence[Tensor], block_sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """The block size of each tensor, from all of them one after the other."""
    split, at = [], 0
    for x in inputs:
        split.append(tuple(block_sizes[at : at + x.dim()]))
        at += x.dim()
    return split


def _joined(inputs: Sequence[Tensor], masks: Sequence[Tensor], with_mask: bool) -> Tensor:
    starts = mask_starts(inputs)
    device = inputs[0].device if inputs else None
    joined = torch.zeros(starts[-1] if with_mask else 0, dtype=torch.uint8, device=device)
    for start, mask in zip(starts[:-1], masks, strict=True):
        joined[start : start + mask.numel()] = mask
    return joined


def fake_quantize_forward(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    minvals: Sequence[Tensor],
    block_sizes: Sequence[int],
    format: int,
    quant_min: float,
    quant_max: float,
    with_mask: bool,
) -> tuple[list[Tensor], Tensor]:
    """Fake-quantized tensors, and their packed masks in one: each starts where :func:`mask_starts` says.

    ``zero_points`` and ``minvals`` are empty where the formulation has none; ``block_sizes`` holds those of
    all tensors one after the other.
    """
    found = []
    for i, (x, block_size) in enumerate(zip(inputs, split_block_sizes(inputs, block_sizes), strict=True)):
        zero_point = zero_points[i] if zero_points else None
        minval = minvals[i] if minvals else None
        found.append(
            fake_quantize.forward(
                x, scales[i], zero_point, minval, block_size, format, quant_min, quant_max, with_mask
            )
        )
    return [output for output, _ in found], _joined(inputs, [mask for _, mask in found], with_mask)


def backward(
    grads: Sequence[Tensor], mask: Tensor, starts: Sequence[int], orders: Sequence[int]
) -> list[Tensor]:
    """``grads`` times their masks, which begin at ``starts``.

    ``orders`` are the memory orders of the results one after the other; empty if all are row-major.
    """
    results, at = [], 0
    for grad, start in zip(grads, starts, strict=True):
        order = list(orders[at : at + grad.dim()]) if orders else list(range(grad.dim()))
        at += grad.dim()
        bits = mask[start : start + (grad.numel() + 7) // 8]
        results.append(fake_quantize.backward(grad, bits, order))
    return results


def backward_(grads: Sequence[Tensor], mask: Tensor, starts: Sequence[int], orders: Sequence[int]) -> None:
    """:func:`backward`, in place."""
    for grad, result in zip(grads, backward(grads, mask, starts, orders), strict=True):
        grad.copy_(result)


def observe_and_fake_quantize_(
    inputs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    minvals: Sequence[Tensor],
    running_mins: Sequence[Tensor],
    running_maxs: Sequence[Tensor],
    has_running: bool,
    config: QuantConfig,
    with_mask: bool,
) -> tuple[list[Tensor], Tensor]:
    """As :func:`fake_quantize_forward`, observing first; the states, some of them empty, are written."""
    columns = (scales, zero_points, minvals, running_mins, running_maxs)
    found = []
    split = split_block_sizes(inputs, config.block_size)
    for i, (x, block_size) in enumerate(zip(inputs, split, strict=True)):
        state = [column[i] if column else None for column in columns]
        low, high = state[3:] if has_running else (None, None)
        output, mask, *new = observe_and_fake_quantize(
            x, low, high, config.with_block_size(block_size), with_mask
        )
        for old, value in zip(state, new, strict=True):
            if old is not None:
                old.copy_(value)
        found.append((output, mask))
    return [output for output, _ in found], _joined(inputs, [mask for _, mask in found], with_mask)
