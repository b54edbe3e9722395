"""Compression levels as functions of the progress of a run.

``initial`` and ``target`` are levels in [0, 1]; ``progress`` is the share of the way between them, clamped to
[0, 1]. Everything is computed on the host in double precision.
"""

import bisect
import math
from collections.abc import Sequence

__all__ = ["biased_exponential", "exponential", "multistep", "polynomial", "share_of"]


def share_of(epoch: float, epochs: float) -> float:
    """``epoch / epochs`` in [0, 1]; 1 where there are no epochs to spend."""
    return 1.0 if epochs <= 0 else min(max(epoch / epochs, 0.0), 1.0)


def polynomial(progress: float, initial: float, target: float, power: float, concave: bool = True) -> float:
    """Polynomial level.

    Concave, ``target - (target - initial) * (1 - progress)**power``, it rises fast first; convex,
    ``initial + (target - initial) * progress**power``, fast last. After Zhu and Gupta (arXiv 1710.01878).
    """
    progress = min(max(progress, 0.0), 1.0)
    if concave:
        return target - (target - initial) * (1 - progress) ** power
    return initial + (target - initial) * progress**power


def exponential(progress: float, initial: float, target: float) -> float:
    """The level whose density decays geometrically from ``1 - initial`` to ``1 - target``."""
    progress = min(max(progress, 0.0), 1.0)
    if initial >= 1:
        return initial if progress < 1 else target
    return 1 - (1 - initial) * ((1 - target) / (1 - initial)) ** progress


def multistep(epoch: int, steps: Sequence[int], levels: Sequence[float]) -> float:
    """``levels[i]``, where ``i`` counts the ``steps`` (ascending epochs) that have been reached."""
    return levels[bisect.bisect_right(steps, epoch)]


def biased_exponential(epoch: float, initial: float, target: float, epochs: float) -> float:
    """``f(epoch) = a * exp(-k * epoch) + b``, clamped to ``[0, epochs]``, fixed by three points.

    ``f(0) = initial``, ``f(epochs) = target`` and ``f(epochs / 8) = 3/4 * target``. With
    ``x = exp(-k * epochs / 8)`` they say ``1 + x + ... + x**7 = (target - initial) / (3/4 * target -
    initial)``, which has one solution in (0, 1) if ``initial < 5/7 * target``.

    Raises:
        ValueError: ``initial`` is larger.
    """
    if initial == target or epochs <= 0:
        return target
    if not 0 <= initial < 5 / 7 * target:
        raise ValueError(
            f"the initial level must be at least 0 and below 5/7 of the target for an exponential with bias; "
            f"got {initial} and {target}"
        )
    ratio = (target - initial) / (0.75 * target - initial)
    low, high = 0.0, 1.0
    for _ in range(200):
        x = (low + high) / 2
        if sum(x**power for power in range(8)) < ratio:
            low = x
        else:
            high = x
    x = (low + high) / 2
    a = (0.75 * target - initial) / (x - 1)
    return a * math.pow(x, 8 * min(max(epoch, 0.0), epochs) / epochs) + (initial - a)
