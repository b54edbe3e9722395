"""From measurements to the candidate of each layer: the best within a budget, and a greedy one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from coreai_opt.search.measuring import Measurement

__all__ = ["Option", "greedy", "options_of", "optimal", "pareto_front"]

# More points than this of a front are thinned to it.
_MOST_POINTS = 20_000


@dataclass(frozen=True)
class Option:
    """What one layer can be: ``candidate`` None for leaving it as it is."""

    candidate: str | None
    damage: float
    bits: int


Options = Mapping[str, Sequence[Option]]


def options_of(measurements: Sequence[Measurement], float_bits: Mapping[str, int]) -> dict[str, list[Option]]:
    """The options of each layer, the uncompressed one first. Damages below zero count as none."""
    options = {layer: [Option(None, 0.0, bits)] for layer, bits in float_bits.items()}
    for each in measurements:
        options[each.layer].append(Option(each.candidate, max(each.damage, 0.0), each.bits))
    return options


def greedy(options: Options, budget: int) -> dict[str, str | None] | None:
    """Apply candidates from the least harmful on, each in place of the layer's earlier one, until it fits.

    Args:
        options: of each layer.
        budget: bits for all layers.

    Returns:
        The candidate of each layer; None if the budget is not reached.
    """
    chosen = {layer: choices[0] for layer, choices in options.items()}
    total = sum(option.bits for option in chosen.values())
    order = sorted(
        ((option, layer) for layer, choices in options.items() for option in choices[1:]),
        key=lambda pair: pair[0].damage,
    )
    for option, layer in order:
        if total <= budget:
            break
        total += option.bits - chosen[layer].bits
        chosen[layer] = option
    if total > budget:
        return None
    return {layer: option.candidate for layer, option in chosen.items()}


class _Front:
    """The assignments of some layers of which no other is better in both bits and damage, by bits."""

    def __init__(self, bits: np.ndarray, damage: np.ndarray, parent: np.ndarray, choice: np.ndarray) -> None:
        self.bits, self.damage, self.parent, self.choice = bits, damage, parent, choice

    @classmethod
    def start(cls) -> "_Front":
        return cls(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))

    def extended(self, choices: Sequence[Option]) -> "_Front":
        """With one layer more."""
        count = len(self.bits)
        bits = np.concatenate([self.bits + option.bits for option in choices])
        damage = np.concatenate([self.damage + option.damage for option in choices])
        order = np.lexsort((damage, bits))
        # What costs more must do less damage than all that costs less.
        least = np.minimum.accumulate(damage[order])
        kept = order[np.concatenate([[True], least[1:] < least[:-1]])]
        if len(kept) > _MOST_POINTS:
            kept = kept[_thinned(bits[kept])]
        return _Front(bits[kept], damage[kept], kept % count, kept // count)


def _thinned(bits: np.ndarray) -> np.ndarray:
    """The last point, of least damage, in each of equal ranges of bits; first and last stay."""
    low, high = int(bits[0]), int(bits[-1])
    slot = (bits - low) * (_MOST_POINTS - 1) // max(high - low, 1)
    is_last = np.concatenate([slot[1:] != slot[:-1], [True]])
    is_last[0] = True
    return np.flatnonzero(is_last)


def _fronts(options: Options) -> list[_Front]:
    fronts = [_Front.start()]
    for choices in options.values():
        fronts.append(fronts[-1].extended(choices))
    return fronts


def pareto_front(options: Options) -> list[tuple[int, float]]:
    """Bits and summed damage of the best assignments, from the smallest on."""
    last = _fronts(options)[-1]
    return list(zip(last.bits.tolist(), last.damage.tolist(), strict=True))


def optimal(options: Options, budget: int) -> dict[str, str | None] | None:
    """The assignment with the least sum of damages within the budget, by dynamic programming.

    Exact while a front has at most 20,000 points; beyond, the budget is kept and the damage is at most that
    of a budget smaller by the front's width / 20,000 in each layer.

    Args:
        options: of each layer.
        budget: bits for all layers.

    Returns:
        The candidate of each layer; None if nothing fits.
    """
    fronts = _fronts(options)
    index = int(np.searchsorted(fronts[-1].bits, budget, side="right")) - 1
    if index < 0:
        return None
    chosen: dict[str, str | None] = {}
    for layer, front in zip(reversed(list(options)), reversed(fronts[1:]), strict=True):
        choices = options[layer]
        chosen[layer] = choices[front.choice[index]].candidate
        index = int(front.parent[index])
    return {layer: chosen[layer] for layer in options}
