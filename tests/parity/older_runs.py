"""What 0.3.0 is asked with and without the engine under it: simulators, and two models in eager mode."""

from typing import Any

from .cases import all_cases
from .quantizer_runs import train
from .runner import run_case

__all__ = ["answer"]

GROUPS = ("core-int4-per_block", "core-uint8-per_channel", "core-float8_e4m3fn-per_tensor")
SEQUENCES = ("sequence-observer-toggles", "sequence-fake-quant-off", "sequence-copies")


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """``{"cases": {name: log}, "runs": {model: log}}``."""
    groups = {*GROUPS, *SEQUENCES}
    return {
        "cases": {case.name: tuple(run_case(case)) for case in all_cases() if case.group in groups},
        "runs": {model: train(model, "default") for model in ("mlp", "cnn")},
    }
