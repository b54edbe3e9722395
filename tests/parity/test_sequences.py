"""Random sequences of a user's actions show the same on Apple's package and here."""

import os
from typing import Any

import pytest

from . import sequences
from .conftest import Oracle
from .snapshots import differences

# `make fuzz` takes more, and others.
COUNT = int(os.environ.get("FUZZ_EXAMPLES", "60"))
START = int(os.environ.get("FUZZ_START", "0"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_sequence_of_actions_shows_the_same(asked_oracle: Oracle) -> None:
    seeds = range(START, START + COUNT)
    job: dict[str, Any] = {"module": "sequences", "seeds": list(seeds)}
    expected = asked_oracle.ask("sequences", job)
    wrong = []
    for seed in seeds:
        for at, (one, other) in enumerate(zip(expected[seed], sequences.run(seed), strict=True)):
            found = list(differences(one, other, f"sequence {seed}, {at}: {one['kind']}, {one['word']}"))
            if found:
                wrong += found[:1]
                break
    assert not wrong, f"{len(wrong)} sequences differ:\n" + "\n".join(wrong[:20])
