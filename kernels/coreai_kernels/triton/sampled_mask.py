"""``sampled_mask_forward`` and ``sampled_mask_backward``: four elements a call of Philox."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coreai_kernels.triton import tiles
from coreai_kernels.triton.elementwise import fp32, narrow, round_half_even
from coreai_kernels.triton.launch import launch
from coreai_kernels.triton.layout import dense

__all__ = ["sampled_mask_backward", "sampled_mask_forward"]

_TILE = 1024


@triton.jit
def _uniform(first_block, draw, seed, TILE: tl.constexpr):
    block = first_block + tl.arange(0, TILE // 4)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    number = block * 0 + draw
    r0, r1, r2, r3 = tl.philox(seed, low, high, number.to(tl.uint32), (number >> 32).to(tl.uint32), 7)
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [TILE])
    return ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _terms(s, u):
    """See ``reference/sampled_mask.py``."""
    x = tl.where(s > -64.0, s, -64.0)
    x = tl.where(x < 64.0, x, 64.0)
    t = x * 1.44269504088896341
    n = round_half_even(t)
    f = t - n
    p = f * 0.0 + 1.3264727e-3
    p = p * f + 9.671513e-3
    p = p * f + 5.5507336e-2
    p = p * f + 2.4022242e-1
    p = p * f + 6.9314700e-1
    p = p * f + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return u * (p * power), 1.0 - u


@triton.jit(do_not_specialize=["seed", "numel"])
def _forward(weight, logits, draw, output, seed, numel, UNIT: tl.constexpr, TILE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    element = start + tl.arange(0, TILE)
    valid = element < numel.to(tl.int64) * UNIT
    s = tl.load(logits + element, mask=valid, other=0.0)
    a, b = _terms(s, _uniform(start // 4, tl.load(draw), seed, TILE))
    w = fp32(tl.load(weight + element, mask=valid, other=0.0))
    tl.store(output + element, narrow(w * (a > b).to(tl.float32), output.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["seed", "numel"])
def _backward(
    grad, weight, logits, draw, to_weight, to_logits, seed, numel, UNIT: tl.constexpr, TILE: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * TILE
    element = start + tl.arange(0, TILE)
    valid = element < numel.to(tl.int64) * UNIT
    s = tl.load(logits + element, mask=valid, other=0.0)
    a, b = _terms(s, _uniform(start // 4, tl.load(draw), seed, TILE))
    g = fp32(tl.load(grad + element, mask=valid, other=0.0))
    w = fp32(tl.load(weight + element, mask=valid, other=0.0))
    inverse = tl.math.div_rn(1.0, a + b)
    slope = (a * inverse) * (b * inverse)
    tl.store(to_weight + element, narrow(g * (a > b).to(tl.float32), to_weight.dtype.element_ty), mask=valid)
    tl.store(to_logits + element, (g * w) * slope, mask=valid)


def _like(x: Tensor, format: Tensor) -> Tensor:
    """``x`` in the memory format of the dense tensor ``format``."""
    return x if x.stride() == format.stride() else torch.empty_like(format, dtype=x.dtype).copy_(x)


def _run(kernel: Any, inputs: list[Tensor], draw: Tensor, outputs: list[Tensor], seed: int) -> None:
    numel = inputs[0].numel()
    if numel:
        programs = triton.cdiv(numel, _TILE)
        unit = tiles.unit_of(numel)
        tensors = (*inputs, draw, *outputs)
        launch(kernel, programs, inputs[0], *tensors, seed, numel // unit, UNIT=unit, TILE=_TILE, warps=4)


def sampled_mask_forward(weight: Tensor, logits: Tensor, draw: Tensor, seed: int) -> Tensor:
    """See ``reference/sampled_mask.py``."""
    source = dense(weight)
    output = torch.empty_like(source)
    _run(_forward, [source, _like(logits, source)], draw, [output], seed)
    return output


def sampled_mask_backward(
    grad: Tensor, weight: Tensor, logits: Tensor, draw: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """See ``reference/sampled_mask.py``."""
    source = dense(weight)
    outputs = torch.empty_like(source), torch.empty_like(source, dtype=torch.float32)
    _run(_backward, [_like(grad, source), source, _like(logits, source)], draw, list(outputs), seed)
    return outputs
