"""``fake_quantize_backward``: the gradient times the packed mask, whatever the format."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases import Case, Sweep, make_input
from benchmarks.harness import Bench, add_if_supported
from benchmarks.ops.operators import MASK_BYTES, bench_of, qparams_of, value_range
from coreai_kernels.ops.library import implementation

__all__ = ["build", "cases", "gradient_and_mask"]


def cases(sweep: Sweep) -> Iterator[Case]:
    return sweep.over("fake_quantize_backward", [("int8", "tensor")])


def gradient_and_mask(case: Case) -> tuple[Tensor, Tensor, float]:
    """A gradient, the packed mask of a forward of the case, and the floor of their product in bytes."""
    x = make_input(case)
    scale, zero_point = qparams_of(case, x)
    args = (x, scale, zero_point, None, case.block_size, *value_range(case), True)
    _, mask = implementation("fake_quantize_forward")(*args)
    return make_input(case, seed=1), mask, case.numel * (2 * case.element_bytes + MASK_BYTES)


def build(case: Case) -> Bench:
    grad, mask, floor = gradient_and_mask(case)
    bench = bench_of(case, "fake_quantize_backward", (grad, mask, []), floor, grad.nbytes)
    inside = torch.ones(grad.shape, dtype=torch.bool)
    backward = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward.default
    add_if_supported(bench, "torch", lambda: backward(grad, inside))
    return bench
