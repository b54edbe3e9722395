"""The table itself: that it covers what it is meant to cover, and that the comparison can fail."""

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch

from .cases import CALCULATORS, GRANULARITIES, INPUT_DTYPES, LAYOUTS, SHAPES, SPECIALS, all_cases
from .snapshots import Raised, differences, freeze


def test_size() -> None:
    assert 1500 <= len(all_cases()) <= 4000


def test_every_pair_of_levels_is_sampled() -> None:
    """Format, calculator, input dtype, layout, special values: each pair of levels occurs together."""
    seen: Counter[tuple[Any, ...]] = Counter()
    levels: dict[str, set[Any]] = {}
    for case in all_cases():
        if not case.group.startswith("mixed"):
            continue
        chosen = {
            "dtype": case.spec["dtype"],
            "scheme": case.spec.get("qscheme"),
            "calculator": case.spec["qparam_calculator_cls"],
            "input": case.input_dtype,
            "layout": case.layout,
            "special": case.special,
            "target": case.target,
        }
        for axis, level in chosen.items():
            levels.setdefault(axis, set()).add(level)
        seen.update(combinations(sorted(chosen.items(), key=lambda pair: pair[0]), 2))
    assert levels["calculator"] == set(CALCULATORS)
    assert levels["layout"] == set(LAYOUTS)
    assert levels["special"] == {"", *SPECIALS}
    assert levels["input"] == set(INPUT_DTYPES)
    # A scheme depends on the dtype, a target on the calculator: those pairs are not free.
    bound = {("dtype", "scheme"), ("calculator", "target"), ("calculator", "scheme")}
    missing = [
        ((a, x), (b, y))
        for a, b in combinations(sorted(levels), 2)
        if (a, b) not in bound
        for x in levels[a]
        for y in levels[b]
        if not seen[((a, x), (b, y))]
    ]
    assert not missing


def test_every_granularity_and_shape_is_sampled() -> None:
    mixed = [case for case in all_cases() if case.group.startswith("mixed")]
    assert {case.shape for case in mixed} == set(SHAPES)
    sampled = [case.spec["granularity"] for case in mixed]
    assert all(granularity in sampled for granularity in GRANULARITIES)


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, -float("nan")]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0 + 2**-23]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        ({"state": torch.tensor([0.0])}, {"state": torch.tensor([-0.0])}, True),
        ({"state": torch.tensor([float("nan")])}, {"state": torch.tensor([1.0])}, False),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ((1, 2), (1, 2, 3), False),
        (1, 1.0, False),
    ],
)
def test_comparison(expected: Any, found: Any, same: bool) -> None:
    assert (not list(differences(freeze(expected), freeze(found)))) is same


def test_exceptions_agree_when_ours_is_a_kind_of_theirs() -> None:
    class Special(ValueError):
        pass

    Special.__module__ = "coreai_opt.errors"
    plain, special, other = (Raised.of(kind("text")) for kind in (ValueError, Special, KeyError))
    assert not list(differences(plain, special))
    assert not list(differences(special, plain))
    assert list(differences(plain, other))
