"""Outputs, gradients and state of whole simulators, bit for bit."""

from typing import Any

import pytest

from .cases import Case, all_cases, group_names
from .intended import is_intended
from .runner import run_case
from .snapshots import differences

SHOWN = 12


def mismatches(case: Case, expected: list[Any], found: list[Any]) -> list[str]:
    """Lines about the first entry of the two logs that differs: what comes after follows from it."""
    if len(expected) != len(found):
        return [f"{len(expected)} entries in the oracle's log, {len(found)} in ours"]
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        where = f"entry {index} ({one['action']})"
        lines = list(differences(one, other, where))
        if lines:
            return [f"{case.name}  {case}", *(f"    {line}" for line in lines)]
    return []


@pytest.mark.parametrize("group", group_names())
def test_like_the_oracle(group: str, backend: str, oracle_answers: dict[str, Any]) -> None:
    cases = [case for case in all_cases() if case.group == group and not is_intended(case.name)]
    answers = oracle_answers["cases"]
    failed = [lines for case in cases if (lines := mismatches(case, answers[case.name], run_case(case)))]
    if failed:
        shown = "\n".join("\n".join(lines) for lines in failed[:SHOWN])
        pytest.fail(f"{len(failed)} of {len(cases)} cases differ:\n{shown}", pytrace=False)
