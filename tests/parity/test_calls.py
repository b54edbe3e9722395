"""Tables, registries, extension points and invalid calls."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from .calls import CALLS
from .cases import all_cases
from .intended import INTENDED, is_intended
from .oracle import ROOT
from .runner import run_call, run_case
from .snapshots import differences


@pytest.mark.parametrize("name", [name for name in CALLS if not is_intended(name)])
def test_like_the_oracle(name: str, oracle_answers: dict[str, Any]) -> None:
    lines = list(differences(oracle_answers["calls"][name], run_call(name)))
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize(("pattern", "title"), INTENDED.items(), ids=list(INTENDED))
def test_intended_differences_are_still_there_and_documented(
    pattern: str, title: str, oracle_answers: dict[str, Any]
) -> None:
    text = Path(ROOT, "docs", "differences.md").read_text()
    assert f"## {title}\n" in text
    cases = [case for case in all_cases() if fnmatchcase(case.name, pattern)]
    calls = [name for name in CALLS if fnmatchcase(name, pattern)]
    differing_cases = (
        case
        for case in cases
        if any(differences(tuple(oracle_answers["cases"][case.name]), tuple(run_case(case))))
    )
    differing_calls = (
        name for name in calls if any(differences(oracle_answers["calls"][name], run_call(name)))
    )
    assert any(differing_cases) or any(differing_calls)
