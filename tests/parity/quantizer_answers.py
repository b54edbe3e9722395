"""All that the oracle's process is asked about quantizers, at once."""

from typing import Any

from . import quantizer_calls, quantizer_scopes
from .quantizer_runs import RUNS, continue_from, train

__all__ = ["answer"]


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """All runs, what follows on states that the other package wrote, places and calls."""
    states = job["states"].items()
    return {
        "runs": {run: train(*run) for run in RUNS},
        "continued": {model: continue_from(model, "default", state) for model, state in states},
        "places": {name: quantizer_scopes.place(name) for name in quantizer_scopes.PLACES},
        "calls": {name: quantizer_calls.call(name) for name in quantizer_calls.CALLS},
    }
