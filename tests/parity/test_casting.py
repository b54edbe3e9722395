"""Programs that are cast are node for node those of Apple's package, but for one named difference."""

from typing import Any

import pytest

from . import cast_programs
from .conftest import Oracle

# float64 inputs: Apple's metadata says float16 where the program computes in float64.
DIFFERENT = {"creation": {"add_4"}, "ignored-creation": {"add_4"}}


@pytest.fixture(scope="module")
def theirs(asked_oracle: Oracle) -> dict[str, Any]:
    return asked_oracle.ask("casting", {"module": "cast_programs"})


@pytest.mark.parametrize("name", cast_programs.CASES)
def test_nodes_and_stored_tensors_are_equal(name: str, theirs: dict[str, Any]) -> None:
    ours = cast_programs.describe(cast_programs.cast(name))
    assert ours["stored"] == theirs[name]["stored"]
    assert [node[1] for node in ours["nodes"]] == [node[1] for node in theirs[name]["nodes"]]
    differing = {
        mine[1] for mine, other in zip(ours["nodes"], theirs[name]["nodes"], strict=True) if mine != other
    }
    assert differing == DIFFERENT.get(name, set())
