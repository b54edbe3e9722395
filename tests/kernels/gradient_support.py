"""Gradients masked in place, one or a list of them, against what the reference makes of copies."""

import torch
from torch import Tensor

from coreai_kernels.backends import use_backend
from coreai_kernels.ops.library import implementation
from coreai_kernels.reference.foreach import mask_starts
from tests.kernels.support import SPECIAL, assert_same_bits

__all__ = ["DENSITIES", "check_masked_in_place"]

# How many of the bits are set, all of them more often than not.
DENSITIES = (0.0, 0.5, 0.97, 0.9999, 1.0)
# Shapes, and their axes from the outermost in memory to the innermost.
_SHAPES: list[tuple[tuple[int, ...], list[int]]] = [
    ((), []),
    ((0, 3), [0, 1]),
    ((5,), [0]),
    ((64,), [0]),
    ((33, 130), [1, 0]),
    ((2, 8, 5, 7), [0, 2, 3, 1]),
    ((40, 1, 129), [0, 1, 2]),
    ((3, 4099), [0, 1]),
]


def _gradient(shape: tuple[int, ...], order: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # In float64, so that float64 gradients are none of float32: they are rounded to it.
    flat = torch.randn(shape, generator=generator, dtype=torch.float64).flatten()
    places = torch.rand(flat.shape, generator=generator) < 0.1
    specials = torch.tensor(SPECIAL, dtype=flat.dtype).repeat(flat.numel() // len(SPECIAL) + 1)
    flat[places] = specials[: flat.numel()][places]
    in_order = flat.to(dtype).reshape([shape[axis] for axis in order])
    return in_order.permute([order.index(axis) for axis in range(len(shape))])


def check_masked_in_place(backend: str, device: str, dtype: torch.dtype, density: float) -> None:
    """Both operators, with gradients in all memory orders."""
    generator = torch.Generator().manual_seed(0)
    grads = [_gradient(*shape_and_order, dtype, i) for i, shape_and_order in enumerate(_SHAPES)]
    orders = [order for _, order in _SHAPES]
    axes = [axis for order in orders for axis in order]
    starts = mask_starts(grads)
    bits = (torch.rand(starts[-1], 8, generator=generator) < density).to(torch.uint8)
    mask = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    with use_backend("reference"):
        masked = implementation("foreach_fake_quantize_backward")(grads, mask, starts[:-1], axes)
    mine = [grad.to(device, copy=True) for grad in grads]
    with use_backend(backend):
        in_place = implementation("foreach_fake_quantize_backward_")
        in_place(mine, mask.to(device), starts[:-1], axes)
        singly = [grad.to(device, copy=True) for grad in grads]
        for grad, order, start in zip(singly, orders, starts, strict=False):
            its_mask = mask[start : start + (grad.numel() + 7) // 8].to(device)
            implementation("fake_quantize_backward_")(grad, its_mask, order)
    for wanted, one, other in zip(masked, mine, singly, strict=True):
        assert_same_bits(one.cpu(), wanted, "in a list")
        assert_same_bits(other.cpu(), wanted, "alone")
