"""Masks drawn at random from logits: the definition."""

import torch
from torch import Tensor

from coreai_kernels.reference.layout import from_memory_order, in_memory_order, memory_order

__all__ = ["backward", "forward", "logistic_terms", "philox", "uniform"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# 2**f for f in [-1/2, 1/2] to a relative 1e-7, with the least greatest error among those that are 1 at 0.
_EXP2 = (1.3264727e-3, 9.671513e-3, 5.5507336e-2, 2.4022242e-1, 6.9314700e-1, 1.0)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox 4x32-7 (Salmon et al., SC 2011): four random 32-bit words for each counter of four words.

    Seven rounds are the least that pass the authors' tests (BigCrush); ten are their margin beyond. The
    words are held in int64, whose product wraps around with the right bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1, c2, c3]


def uniform(numel: int, draw: Tensor, seed: int) -> Tensor:
    """``numel`` numbers, odd multiples of ``2**-24`` between 0 and 1, of the draw with number ``draw``.

    Element ``i`` has word ``i % 4`` of the counter ``(i // 4, draw)`` under the key ``seed``.
    """
    block = torch.arange((numel + 3) // 4, dtype=torch.int64, device=draw.device)
    number = draw.reshape(()).expand(block.shape)
    words = philox(
        [block & _WORD, block >> 32, number & _WORD, (number >> 32) & _WORD],
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    random = torch.stack(words, dim=1).reshape(-1)[:numel]
    return ((random >> 9).float() + 0.5) * 2.0**-23


def logistic_terms(logits: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``a = u * exp(s)`` and ``b = 1 - u``, so that ``sigmoid(s + log(u / (1 - u))) = a / (a + b)``.

    The exponential is a polynomial in float32, each operation rounded: every backend has the same bits, which
    no library's exponential has. Logits count as at most 64 in magnitude, beyond any draw, and NaN as -64.
    """
    x = torch.where(logits > -64, logits, -64.0)
    x = torch.where(x < 64, x, 64.0)
    t = x * 1.44269504088896341
    n = t.round()
    f = t - n
    p = torch.full_like(f, _EXP2[0])
    for coefficient in _EXP2[1:]:
        p = p * f + coefficient
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return u * (p * power), 1.0 - u


def _terms(logits: Tensor, order: list[int], draw: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    flat = in_memory_order(logits, order)
    return logistic_terms(flat, uniform(flat.numel(), draw, seed))


def forward(weight: Tensor, logits: Tensor, draw: Tensor, seed: int) -> Tensor:
    """``weight * mask``, with ``mask = 1`` where ``a > b``; in the weight's memory order and format."""
    order = memory_order(torch.empty_like(weight))
    a, b = _terms(logits, order, draw, seed)
    product = in_memory_order(weight, order).float() * (a > b)
    return from_memory_order(product.to(weight.dtype), weight.shape, order)


def backward(grad: Tensor, weight: Tensor, logits: Tensor, draw: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """``grad * mask``, and ``grad * weight`` times the slope ``a * i * (b * i)`` with ``i = 1 / (a + b)``."""
    order = memory_order(torch.empty_like(weight))
    a, b = _terms(logits, order, draw, seed)
    g = in_memory_order(grad, order).float()
    inverse = (a + b).reciprocal()
    to_logits = (g * in_memory_order(weight, order).float()) * ((a * inverse) * (b * inverse))
    to_weight = (g * (a > b)).to(weight.dtype)
    return (
        from_memory_order(to_weight, weight.shape, order),
        from_memory_order(to_logits, weight.shape, order),
    )
