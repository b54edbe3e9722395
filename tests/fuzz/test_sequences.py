"""A compressor in a random sequence of a user's actions: the fast backend does what the reference does.

FUZZ_EXAMPLES: sequences (default 200); ``make fuzz`` takes many. The same actions, in
sequences drawn by a seed, are compared with Apple's package in tests/parity/test_sequences.py.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coreai_kernels import use_backend
from tests.parity.sequences import KINDS, WORDS, Session
from tests.parity.snapshots import differences

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))


class Compressor(RuleBasedStateMachine):
    """The same session on two backends."""

    @initialize(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**16))
    def begin(self, kind: str, seed: int) -> None:
        self.sessions = {name: Session(kind, seed) for name in ("reference", "auto")}
        self.play("prepare")

    def play(self, word: str) -> None:
        found = {}
        for name, session in self.sessions.items():
            torch.manual_seed(0)
            with use_backend(name):
                found[name] = session.play(word)
        wrong = list(differences(found["reference"], found["auto"], word))
        assert not wrong, wrong[:5]

    @rule(word=st.sampled_from(sorted(set(WORDS) - {"finalize"})))
    def act(self, word: str) -> None:
        self.play(word)

    @precondition(lambda self: not self.sessions["auto"].finalized)
    @rule()
    def finalize(self) -> None:
        self.play("finalize")


@pytest.mark.slow
def test_a_sequence_of_actions_does_the_same_on_both_backends() -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Compressor,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=10, deadline=None, suppress_health_check=checks
        ),
    )
