"""Counts the instructions of a loop in the listing of a kernel's machine code.

Of two ways through a loop the one that stores more is followed, then the one with more loads of 16 bytes,
then the shorter one: elements out of the ordinary are taken one by one, in loops inside or behind calls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.gpu_model.machine_code import Line, parse, width

__all__ = ["LoopCounts", "count_loops"]

_NONE = (-1, 0, 0)
# Of global memory; a compiler that lost track of a pointer has the general instruction.
_LOADS, _STORES = ("LDG.", "LD."), ("STG", "ST")
_SHARED_STORES = ("STS", "ATOMS", "RED", "ATOMG")


@dataclass(frozen=True)
class LoopCounts:
    """What one thread issues.

    Attributes:
        inside: in one round of the innermost loop with the most loads of 16 bytes.
        around: in one round of the loop around it, or without one in the whole kernel; one round of the
            innermost loop is part of it.
        between_barriers: of those inside, those between two barriers, if there are two: one warp does that
            for all.
        storing: in one round of another innermost loop, the one with the most stores of 16 bytes; 0: there is
            none. ``around`` has one round of it.
        ahead: rounds of the loop that ``around`` has beyond the one, as compilers put them ahead of it.
        between_barriers_around: of those around, between each barrier and the next.
        in_flight: bytes that a round of the innermost loop loads, by its widest loads.
    """

    inside: int
    around: int
    between_barriers: int
    in_flight: int
    storing: int = 0
    ahead: int = 0
    between_barriers_around: Sequence[int] = ()


def count_loops(listing: str) -> LoopCounts:
    """Follow the main loop of the only kernel in a listing.

    Raises:
        ValueError: there is no loop, or no way through it.
    """
    lines, labels = parse(listing)
    ends: dict[int, int] = {}  # where the last jump back to a loop's start is
    for position, line in enumerate(lines):
        if line.name.startswith("BRA") and line.target is not None and labels[line.target] < position:
            ends[labels[line.target]] = position
    loops = sorted(ends.items())
    if not loops:
        raise ValueError("the kernel has no loop")

    def contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    def own_wide(loop: tuple[int, int], names: tuple[str, ...] = _LOADS) -> int:
        inner = [other for other in loops if contains(loop, other)]
        own = (i for i in range(loop[0], loop[1] + 1) if not any(a <= i <= b for a, b in inner))
        return sum(_is_wide(lines[i], names) for i in own)

    loop = max(loops, key=lambda each: (own_wide(each), each[1] - each[0]))
    inside = _way(lines, labels, *loop)
    wide_stores = tuple(f"{name}." for name in _STORES)
    storing = max(loops, key=lambda each: own_wide(each, wide_stores))
    stores = _way(lines, labels, *storing) if storing != loop and own_wide(storing, wide_stores) else []
    outer = min((each for each in loops if contains(each, loop)), key=lambda e: e[1] - e[0], default=None)
    around = _way(lines, labels, *(outer or (0, len(lines) - 1)))
    return LoopCounts(
        inside=_issued(lines, inside),
        around=_issued(lines, around),
        between_barriers=_between_barriers(lines, inside),
        in_flight=_in_flight([width(lines[i].name) for i in inside if lines[i].name.startswith(_LOADS)]),
        storing=_issued(lines, stores),
        ahead=_loads(lines, around) // max(1, _loads(lines, inside)) - 1,
        between_barriers_around=[
            _issued(lines, around[here + 1 : there]) for here, there in pairwise(_barriers(lines, around))
        ],
    )


def _is_wide(line: Line, names: tuple[str, ...] = _LOADS) -> bool:
    return line.name.startswith(names) and ".128" in line.name


def _loads(lines: Sequence[Line], way: Sequence[int]) -> int:
    return sum(_is_wide(lines[i]) for i in way)


def _in_flight(widths: Sequence[int]) -> int:
    return sum(each for each in widths if each == max(widths))


def _issued(lines: Sequence[Line], way: Sequence[int]) -> int:
    return sum(lines[i].name != "NOP" for i in way)


def _barriers(lines: Sequence[Line], way: Sequence[int]) -> list[int]:
    return [at for at, i in enumerate(way) if lines[i].name.startswith("BAR.SYNC")]


def _between_barriers(lines: Sequence[Line], way: Sequence[int]) -> int:
    barriers = _barriers(lines, way)
    return _issued(lines, way[barriers[0] + 1 : barriers[-1]]) if len(barriers) == 2 else 0


def _way(lines: Sequence[Line], labels: Mapping[str, int], first: int, last: int) -> list[int]:
    """Positions of the instructions from ``first`` to ``last``, or to an exit; jumps back are not taken.

    Raises:
        ValueError: there is no way.
    """
    # What lies ahead: bytes stored, wide loads, instructions as a negative number; and where to go on.
    ahead: dict[int, tuple[tuple[int, int, int], int | None]] = {}
    is_loop = lines[last].target is not None and labels[str(lines[last].target)] == first
    for position in range(last, first - 1, -1):
        line = lines[position]
        kind = line.name.split(".")[0]
        goals: list[int] = []
        ends = False
        if kind in ("EXIT", "RET"):
            ends = kind == "EXIT" and not is_loop
            goals = [position + 1] if line.is_conditional else []
        elif kind == "BRA" and line.target is not None:
            ends = is_loop and labels[line.target] == first
            goals = [labels[line.target]] + ([position + 1] if line.is_conditional else [])
        else:
            goals = [position + 1]
        choices: list[tuple[tuple[int, int, int], int | None]] = [
            (ahead[goal][0], goal) for goal in goals if position < goal <= last and goal in ahead
        ]
        if ends:
            choices.append(((0, 0, 0), None))
        best, goal = max(choices, key=lambda pair: pair[0], default=(_NONE, None))
        if best == _NONE:
            continue
        stores = width(line.name) if kind in _STORES else 4 * line.name.startswith(_SHARED_STORES)
        ahead[position] = ((best[0] + stores, best[1] + _is_wide(line), best[2] - 1), goal)
    if first not in ahead:
        raise ValueError("there is no way through the loop")
    way: list[int] = []
    position_or_end: int | None = first
    while position_or_end is not None:
        way.append(position_or_end)
        position_or_end = ahead[position_or_end][1]
    return way
