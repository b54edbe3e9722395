"""Models finalized for Core AI and Core ML hold and compute what they do in Apple's package."""

from typing import Any

import pytest

from .conftest import Oracle
from .export_runs import CASES, finalized
from .snapshots import differences

BACKENDS = ("coreai", "coreml")
JOB = {"module": "export_runs", "backends": BACKENDS}


@pytest.fixture(scope="module")
def answers(asked_oracle: Oracle, one_thread: None) -> dict[tuple[str, str], Any]:
    pytest.importorskip("coreai_torch", reason="needs the extra coreai")
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    answer: dict[tuple[str, str], Any] = asked_oracle.ask("export", JOB)
    return answer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_like_the_oracle(name: str, backend: str, answers: dict[tuple[str, str], Any]) -> None:
    expected, found = answers[name, backend], finalized(name, backend)
    if name == "pruned" and backend == "coreai":  # "Finalized for Core AI": the dense weight goes
        for key in ("0", "2"):
            original = f"{key}.parametrizations.weight.original"
            assert expected["state"].pop(original).shape != (0,)
            assert found["state"].pop(original).shape == (0,)
    lines = list(differences(expected, found))
    if lines:
        pytest.fail("\n".join(lines[:20]), pytrace=False)
